"""Validation: prompts through the family's own diffusers pipeline, with the live denoiser and cached embeddings.

It has its own random stream (CPU generators from `validation_seed`), so training is bit-equal with validation on or
off. The pipeline (its VAE) is loaded for each validation and released after it.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hooktuner.context import Run
from hooktuner.data import write_video
from hooktuner.errors import ModelError
from hooktuner.family import Part, SampleRequest, SamplingPipeline
from hooktuner.files import partial_name
from hooktuner.plugins import PluginSet
from hooktuner.train.precision import autocast

FOLDER = "validation"


@dataclass(frozen=True)
class Prompt:
    """One prompt to sample; `name` is safe in file names and unique."""

    name: str
    text: str


def named_prompts(prompts: Mapping[str, str]) -> list[Prompt]:
    """Prompts by nickname, under names that every file system takes.

    Characters that file systems refuse become underscores, long names are cut, and nicknames that become equal (also
    to a file system that does not tell upper from lower case) are numbered.
    """
    named: list[Prompt] = []
    for nickname, text in prompts.items():
        stem = re.sub(r"_+", "_", re.sub(r"[^\w.-]", "_", nickname)).strip("._")[:80] or "prompt"
        name, number = stem, 1
        while name.casefold() in {prompt.name.casefold() for prompt in named}:
            number += 1
            name = f"{stem}-{number}"
        named.append(Prompt(name, text))
    return named


class Validator:
    """Samples every prompt at every size.

    `text` gives cached embeddings. `first_frames`, for flavours that start from one, gives images of a size (width,
    height); prompts take them in turn.
    """

    def __init__(
        self,
        run: Run,
        plugins: PluginSet,
        prompts: Sequence[Prompt],
        text: Callable[[str], Mapping[str, Tensor]],
        first_frames: Callable[[tuple[int, int]], Sequence[Image.Image]] | None = None,
    ) -> None:
        assert run.card is not None
        config = run.config
        self.run = run
        self.plugins = plugins
        self.prompts = list(prompts)
        self._text = text
        self._first_frames = first_frames
        self._sizes = config.validation_sizes()
        still = run.card.media == "image"
        self._frames = 1 if still else _given(config.validation_num_video_frames, "validation_num_video_frames")
        self._guidance = _given(config.validation_guidance, "validation_guidance")
        self._negative = config.validation_negative_prompt or ""
        self._seed = config.seed if config.validation_seed is None else config.validation_seed

    def requests(self) -> Iterator[tuple[str, SampleRequest]]:
        """(file stem, request) for every size and prompt."""
        for width, height in self._sizes:
            images = self._first_frames((width, height)) if self._first_frames else [None]
            for number, prompt in enumerate(self.prompts):
                yield (
                    f"{prompt.name}_{width}x{height}",
                    SampleRequest(
                        prompt=self._text(prompt.text),
                        negative=self._text(self._negative),
                        width=width,
                        height=height,
                        frames=self._frames,
                        steps=self.run.config.validation_num_inference_steps,
                        guidance=self._guidance,
                        seed=self._seed,
                        image=images[number % len(images)],
                    ),
                )

    def validate(self, denoiser: nn.Module, step: int) -> list[Path]:
        """Write media of the live denoiser under `validation/step-NNNNNN/`; returns the files."""
        if not self.prompts:
            return []
        folder = self.run.output_dir / FOLDER / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        with sampling(self.run, self.plugins, denoiser) as pipeline:
            for stem, request in self.requests():
                frames_FHWC = pipeline.sample(denoiser, request)
                files.append(self._write(folder / stem, frames_FHWC))
        return files

    def _write(self, stem: Path, frames_FHWC: Any) -> Path:
        assert self.run.card is not None
        if self.run.card.media == "image":
            path = stem.with_name(stem.name + ".png")
            temporary = partial_name(path)
            Image.fromarray(frames_FHWC[0]).save(temporary)
            temporary.replace(path)
        else:
            path = stem.with_name(stem.name + ".mp4")
            write_video(path, frames_FHWC, _given(self.run.config.frame_rate, "frame_rate"))
        return path


@contextmanager
def sampling(run: Run, plugins: PluginSet, denoiser: nn.Module) -> Iterator[SamplingPipeline]:
    """The family's pipeline around a live denoiser: evaluation mode, no gradients, untouched random streams."""
    assert run.compute_dtype is not None
    assert run.device is not None
    training = denoiser.training
    devices = [run.device] if run.device.type == "cuda" else []
    pipeline = None
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), autocast(run.device, run.compute_dtype):
            denoiser.eval()
            pipeline = plugins.load_model(run, Part.PIPELINE)
            if not callable(getattr(pipeline, "sample", None)):
                raise ModelError(f"{plugins.family.name} — its sampling pipeline has no method sample().")
            yield pipeline
    finally:
        del pipeline
        denoiser.train(training)
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _given(value: Any, key: str) -> Any:
    if value is None:
        raise ModelError(
            f"{key} — neither the config nor the model family says a value for it. Set it in the config, or set "
            '"validation_disable": true.'
        )
    return value
