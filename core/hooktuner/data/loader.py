"""From encoded samples to `Batch`es.

An epoch shows every view of every clip once. Its order is a pure function of (seed, epoch), and a batch one of its
number, so resuming needs a number and nothing else. Every draw that belongs to a sample (noise, σ, caption, caption
dropout) is a function of the seed, a purpose and the sample's number in the run.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from hooktuner.data.buckets import Bucket
from hooktuner.errors import DataError
from hooktuner.flow import draw_sigma
from hooktuner.randomness import derive_seed, generator, uniform
from hooktuner.step import Batch

if TYPE_CHECKING:
    from hooktuner.config import RunConfig

TEXTS_IN_MEMORY = 256
"""Encoded captions that are kept in memory after their first use."""


@dataclass(frozen=True)
class Sample:
    """One view of one clip. Paths are cache entries; `captions` are alternatives. `first_frame`: see
    `PlannedClip.first_frame`; None on flavours that take no first frame."""

    key: str
    bucket: Bucket
    latents: Path
    captions: tuple[Path, ...]
    features: Path | None = None
    first_frame: bool | None = None


class Loader:
    """Batches of a list of samples. `samples_per_epoch` and `micros_per_epoch` count one pass over it."""

    def __init__(
        self, samples: Sequence[Sample], config: RunConfig, *, empty_caption: Path, pin_memory: bool = False
    ) -> None:
        if not samples:
            raise DataError("data_backend_config — there is no sample to train on. Check the datasets.")
        self.samples = tuple(samples)
        self.config = config
        self.empty_caption = empty_caption
        self.pin_memory = pin_memory
        self._law = sigma_law(config)
        self._buckets = [
            [number for number, sample in enumerate(self.samples) if sample.bucket == bucket]
            for bucket in sorted({sample.bucket for sample in self.samples})
        ]
        size = config.train_batch_size
        self.samples_per_epoch = len(self.samples)
        self.micros_per_epoch = sum(-(-len(bucket) // size) for bucket in self._buckets)
        self._epoch = lru_cache(maxsize=2)(self._order)
        self._text = lru_cache(maxsize=TEXTS_IN_MEMORY)(load_file)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of what is trained on and in which batches: a run resumed with another one sees other batches."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.config.seed} {self.config.train_batch_size}".encode())
        for sample in self.samples:
            texts = " ".join(path.name for path in sample.captions)
            digest.update(f"{sample.key}\0{sample.bucket.key}\0{sample.latents.name}\0{texts}\n".encode())
        return digest.hexdigest()

    def epoch(self, micro: int) -> int:
        """The epoch, counted from 0, to which a micro-batch of the run belongs."""
        return micro // self.micros_per_epoch

    def count(self, micro: int) -> int:
        """How many samples a micro-batch of the run has, without loading it."""
        epoch, position = divmod(micro, self.micros_per_epoch)
        return len(self._epoch(epoch)[position])

    def _order(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The micro-batches of an epoch as (sample's number in the run, position in `samples`)."""
        seed, size = self.config.seed, self.config.train_batch_size
        micros: list[list[int]] = []
        for bucket in self._buckets:
            shuffled = sorted(bucket, key=lambda number: derive_seed(seed, "order", epoch, number))
            micros += [shuffled[begin : begin + size] for begin in range(0, len(shuffled), size)]
        order = sorted(range(len(micros)), key=lambda number: derive_seed(seed, "micro-order", epoch, number))
        index = epoch * self.samples_per_epoch
        numbered: list[list[tuple[int, int]]] = []
        for number in order:
            numbered.append(list(enumerate(micros[number], start=index)))
            index += len(micros[number])
        return numbered

    def batch(self, micro: int) -> Batch:
        """Micro-batch `micro` of the run, counted from 0 over all epochs, on the CPU. A pure function of the samples,
        the config and `micro`; latents, noise and σ are float32. The last of a bucket may be smaller."""
        epoch, position = divmod(micro, self.micros_per_epoch)
        chosen = [(index, self.samples[number]) for index, number in self._epoch(epoch)[position]]
        entries = [_load(sample.latents, sample) for _, sample in chosen]
        latents_BCFHW = torch.stack([entry.pop("latents").float() for entry in entries])
        extras = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in _stack(entries).items()
        }
        if chosen[0][1].first_frame is not None:
            extras["first_frame"] = torch.tensor([bool(sample.first_frame) for _, sample in chosen])
        features = [_load(sample.features, sample) if sample.features else {} for _, sample in chosen]
        bucket = chosen[0][1].bucket
        seed = self.config.seed
        noise = [torch.randn(latents_BCFHW.shape[1:], generator=generator(seed, "noise", index)) for index, _ in chosen]
        sigma = [self._draw_sigma(index) for index, _ in chosen]
        return Batch(
            keys=[sample.key for _, sample in chosen],
            index=[index for index, _ in chosen],
            latents_BCFHW=latents_BCFHW,
            noise_BCFHW=torch.stack(noise),
            sigma_B=torch.cat(sigma),
            text=[self._draw_text(index, sample) for index, sample in chosen],
            extras=extras,
            features=_stack(features),
            pixels=(bucket.frames, bucket.height, bucket.width),
        )

    def _draw_sigma(self, index: int) -> torch.Tensor:
        config = self.config
        return draw_sigma(
            1,
            generator(config.seed, "sigma", index),
            law=self._law,
            sigmoid_scale=config.flow_sigmoid_scale,
            beta=(config.flow_beta_schedule_alpha, config.flow_beta_schedule_beta),
            shift=config.flow_schedule_shift or 1.0,
        )

    def _draw_text(self, index: int, sample: Sample) -> Mapping[str, torch.Tensor]:
        seed = self.config.seed
        if uniform(seed, "caption-dropout", index) < self.config.caption_dropout_probability:
            return self._text(self.empty_caption)
        return self._text(sample.captions[int(uniform(seed, "caption", index) * len(sample.captions))])

    def stream(self, micros: Iterable[int], prefetch: int = 2) -> Generator[Batch]:
        """The batches of `micros`, up to `prefetch` of them made ahead in a thread (in pinned memory, where asked for).

        An exception of the thread is raised here. Close the iterator (`.close()`, or exhaust it) to end the thread.
        """
        made: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
        closed = threading.Event()

        def give(item: Batch | BaseException | None) -> bool:
            while not closed.is_set():
                try:
                    made.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return True
            return False

        def work() -> None:
            try:
                for micro in micros:
                    batch = self.batch(micro)
                    if not give(_pinned(batch) if self.pin_memory else batch):
                        return
                give(None)
            except BaseException as failure:  # crosses to the other thread, whatever it is
                give(failure)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while (item := made.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()


def sigma_law(config: RunConfig) -> str:
    """The law from which σ is drawn before the shift, as `flow.draw_sigma` names it."""
    if config.flow_use_uniform_schedule:
        return "uniform"
    return "beta" if config.flow_use_beta_schedule else "sigmoid"


def _load(path: Path, sample: Sample) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as failure:
        raise DataError(
            f"{sample.key} — its cache entry {path} is gone. Start the run again to make it anew, and do not clear "
            "caches under a run."
        ) from failure


def _stack(entries: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    columns: dict[str, list[torch.Tensor]] = defaultdict(list)
    for entry in entries:
        for name, tensor in entry.items():
            columns[name].append(tensor)
    return {name: torch.stack(column) for name, column in columns.items()}


def _pinned(batch: Batch) -> Batch:
    """The batch in pinned memory, from which copies to the device need not block."""
    return replace(
        batch,
        latents_BCFHW=batch.latents_BCFHW.pin_memory(),
        noise_BCFHW=batch.noise_BCFHW.pin_memory(),
        sigma_B=batch.sigma_B.pin_memory(),
        text=[{name: tensor.pin_memory() for name, tensor in sample.items()} for sample in batch.text],
        extras={name: tensor.pin_memory() for name, tensor in batch.extras.items()},
        features={name: tensor.pin_memory() for name, tensor in batch.features.items()},
    )
