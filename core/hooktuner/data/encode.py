"""The caching phase: captions, then clips, then features; one encoder in memory at a time.

What is on disk already is not made again, so a killed run goes on where it was. Where nothing is missing, no encoder
is loaded at all.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hooktuner.data.cache import CacheKey, EncodingPlugins, Recipe, Store
from hooktuner.data.media import UnreadableError, is_image, read_clip, read_image
from hooktuner.data.plan import PlannedClip
from hooktuner.data.progress import PreparationStopped, progress_bar
from hooktuner.errors import DataError, PluginError
from hooktuner.family import Part
from hooktuner.technique import Clip

if TYPE_CHECKING:
    from rich.console import Console

    from hooktuner.context import Run

Stop = Callable[[], bool]
LOOK_AHEAD = 2
"""Groups of clips that are decoded while the encoder works."""


@dataclass(frozen=True)
class EncodingJob:
    """One view of a clip, and the entry that it is to have."""

    clip: PlannedClip
    view: int
    key: CacheKey
    store: Store

    @property
    def name(self) -> str:
        """For messages."""
        return self.clip.key(self.view)

    def decode(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The frames of the view: uint8 (F, height, width, 3). Errors: `UnreadableError`."""
        clip, plan = self.clip, self.clip.views[self.view]
        if is_image(clip.row.file):
            return read_image(clip.row.file, plan)
        return read_clip(clip.row.file, frames=clip.bucket.frames, frame_rate=clip.frame_rate, plan=plan)


def clip_jobs(
    clips: Iterable[PlannedClip], recipe: Recipe, store_of: Callable[[PlannedClip], Store]
) -> list[EncodingJob]:
    """A job for every view of every clip; views with the same pixels have the same key."""
    return [
        EncodingJob(clip, view, recipe.key(**clip.source(view)), store_of(clip))
        for clip in clips
        for view in range(len(clip.views))
    ]


# ---------------------------------------------------------------------------------------------------------- text


def encode_captions(
    run: Run,
    plugins: EncodingPlugins,
    captions: Iterable[str],
    store: Store,
    *,
    batch_size: int = 32,
    console: Console | None = None,
    stop: Stop | None = None,
) -> dict[str, CacheKey]:
    """Make sure that every caption has an entry; returns their keys.

    `batch_size` captions are given to the encoder and then written at a time.
    Errors: `PreparationStopped` once `stop` answers True; `DataError` for embeddings that are not finite.
    """
    recipe = Recipe.of("text", run, plugins)
    keys = {caption: recipe.key(caption=caption) for caption in captions}
    missing = [caption for caption, key in keys.items() if not store.has(key)]
    if not missing:
        return keys
    _check_stop(stop, "encoding captions", 0, len(missing))
    encoder = plugins.load_model(run, Part.TEXT_ENCODER)
    try:
        with progress_bar("encoding captions", len(missing), console) as advance, torch.no_grad():
            for begin in range(0, len(missing), batch_size):
                _check_stop(stop, "encoding captions", begin, len(missing))
                group = missing[begin : begin + batch_size]
                for caption, tensors in zip(group, plugins.encode_text(run, encoder, group), strict=True):
                    _check_finite(tensors, f"the caption {caption!r}", "Check the text encoder and its dtype.")
                    store.save(keys[caption], tensors)
                    advance()
    finally:
        del encoder
        release_memory(run)
    return keys


# --------------------------------------------------------------------------------------------------------- clips


def encode_clips(
    run: Run,
    plugins: EncodingPlugins,
    jobs: Sequence[EncodingJob],
    *,
    console: Console | None = None,
    stop: Stop | None = None,
) -> dict[str, str]:
    """Make sure that every view has latents. Returns clips that turned out to be unreadable: `clip.key()` → reason.

    `vae_batch_size` clips of one bucket go through the VAE at a time, while the next are decoded.
    Errors: `PreparationStopped`; `DataError` for latents that are not finite; `PluginError` for latents of another
    shape than the card's.
    """
    missing = _missing(jobs)
    failures: dict[Path, str] = {}
    vae = None
    done = 0
    try:
        with progress_bar("encoding clips", len(missing), console) as advance, torch.no_grad():
            for group in _decoded(_groups(missing, run.config.vae_batch_size)):
                _check_stop(stop, "encoding clips", done, len(missing))
                if readable := _readable(group, failures):
                    if vae is None:  # not before there is something to encode
                        vae = plugins.load_model(run, Part.VAE)
                    _encode_group(run, plugins, vae, readable)
                done += len(group)
                advance(len(group))
    finally:
        if vae is not None:
            del vae
            release_memory(run)
    return _failed_clips(jobs, failures)


def _encode_group(
    run: Run, plugins: EncodingPlugins, vae: Any, group: Sequence[tuple[EncodingJob, np.ndarray[Any, Any]]]
) -> None:
    pixels_BCFHW = to_pixels(np.stack([frames for _, frames in group]), run.device)
    encoded = plugins.encode_latents(run, vae, pixels_BCFHW)
    bucket = group[0][0].clip.bucket
    wanted = latent_shape(run, bucket.frames, bucket.height, bucket.width)
    for name, tensor in encoded.items():
        if tensor.shape[:1] != (len(group),) or (name == "latents" and tensor.shape[1:] != wanted):
            expected = f"{(len(group), *wanted)}" if name == "latents" else f"({len(group)}, …)"
            raise PluginError(
                f"{plugins.family.name} — encode_latents answered {name!r} of shape {tuple(tensor.shape)} for clips of "
                f"{bucket.key}; it must be {expected}. This is a mistake in the plugin: report it to its author."
            )
    for number, (job, _) in enumerate(group):
        tensors = {name: tensor[number] for name, tensor in encoded.items()}
        _check_finite(tensors, job.name, "Check the file, and whether the VAE runs in a dtype that it can.")
        job.store.save(job.key, tensors)


def encode_features(
    run: Run,
    plugins: EncodingPlugins,
    jobs: Sequence[EncodingJob],
    *,
    console: Console | None = None,
    stop: Stop | None = None,
) -> dict[str, str]:
    """Make sure that every view has the features that plugins want cached; answers and errors as `encode_clips`.

    Plugins load their network at the first call and release it at `CachingFinished`.
    """
    missing = _missing(jobs)
    failures: dict[Path, str] = {}
    done = 0
    with progress_bar("encoding features", len(missing), console) as advance, torch.no_grad():
        for group in _decoded(_groups(missing, 1)):
            _check_stop(stop, "encoding features", done, len(missing))
            for job, frames_FHWC in _readable(group, failures):
                bucket, row = job.clip.bucket, job.clip.row
                assert row.info is not None
                rate = job.clip.frame_rate or row.info.frame_rate
                shape = latent_shape(run, bucket.frames, bucket.height, bucket.width)
                tensors = plugins.encode_features(run, Clip(job.name, frames_FHWC, rate, shape))
                _check_finite(tensors, job.name, "Check the file and the plugin's encoder.")
                job.store.save(job.key, tensors)
            done += len(group)
            advance(len(group))
    return _failed_clips(jobs, failures)


# --------------------------------------------------------------------------------------------------------- parts


def latent_shape(run: Run, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, F, H, W) of the latents of a clip of the run's flavour."""
    assert run.card is not None
    return run.card.latents_of(run.flavour.name).shape(frames, height, width)


def to_pixels(frames_BFHWC: np.ndarray[Any, Any], device: torch.device | None) -> torch.Tensor:
    """uint8 frames (B, F, height, width, 3) → float32 in [−1, 1], (B, 3, F, height, width), on `device`."""
    frames = torch.from_numpy(frames_BFHWC).to(device or "cpu")
    return frames.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0).contiguous()


def release_memory(run: Run) -> None:
    """Give back what the encoder that was just dropped held."""
    gc.collect()
    if run.device is not None and run.device.type == "cuda":
        torch.cuda.empty_cache()


def _missing(jobs: Sequence[EncodingJob]) -> list[EncodingJob]:
    """Jobs without an entry, each entry once."""
    unique = {job.store.path(job.key): job for job in reversed(jobs)}
    return [job for job in reversed(unique.values()) if not job.store.has(job.key)]


def _groups(jobs: Sequence[EncodingJob], size: int) -> Iterator[list[EncodingJob]]:
    for _, same in groupby(sorted(jobs, key=lambda job: job.clip.bucket), key=lambda job: job.clip.bucket):
        bucket = list(same)
        for begin in range(0, len(bucket), size):
            yield bucket[begin : begin + size]


Decoded = list[tuple[EncodingJob, "np.ndarray[Any, Any] | UnreadableError"]]


def _decoded(groups: Iterable[list[EncodingJob]]) -> Iterator[Decoded]:
    """The groups with their frames, decoded in a thread, at most `LOOK_AHEAD` groups ahead."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
    pending: deque[Future[Decoded]] = deque()
    try:
        for group in groups:
            pending.append(pool.submit(_decode_group, group))
            if len(pending) > LOOK_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode_group(group: list[EncodingJob]) -> Decoded:
    decoded: Decoded = []
    for job in group:
        try:
            decoded.append((job, job.decode()))
        except UnreadableError as failure:
            decoded.append((job, failure))
    return decoded


def _readable(group: Decoded, failures: dict[Path, str]) -> list[tuple[EncodingJob, np.ndarray[Any, Any]]]:
    readable = []
    for job, frames in group:
        if isinstance(frames, UnreadableError):
            failures[job.store.path(job.key)] = str(frames)
        else:
            readable.append((job, frames))
    return readable


def _failed_clips(jobs: Sequence[EncodingJob], failures: Mapping[Path, str]) -> dict[str, str]:
    """Every clip whose entry could not be made, copies of the same file included."""
    entries = {job.clip.key(): job.store.path(job.key) for job in jobs if job.store.path(job.key) in failures}
    return {clip: failures[entry] for clip, entry in entries.items()}


def _check_finite(tensors: Mapping[str, torch.Tensor], name: str, fix: str) -> None:
    for part, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{name} — its encoded {part!r} has values that are not finite. {fix}")


def _check_stop(stop: Stop | None, what: str, done: int, total: int) -> None:
    if stop is not None and stop():
        raise PreparationStopped(what, done, total)
