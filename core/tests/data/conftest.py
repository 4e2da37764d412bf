"""Grey-level clips whose frames say their number, and a family that encodes by averaging pixels."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import av
import numpy as np
import pytest
import torch
from hooktuner.config import PluginOptions, RunConfig
from hooktuner.context import Run
from hooktuner.data.datasets import read_datasets
from hooktuner.family import Flavour, FrameRule, LatentSpec, ModelCard, Part
from hypothesis import settings

# the same examples on every machine, no time limits where others share the processor, nothing left in the tree
settings.register_profile("data", derandomize=True, deadline=None, database=None)
settings.load_profile("data")

SPEC = LatentSpec(channels=3, spatial_stride=8, frames=FrameRule(4, 121), size_multiple=16)


def level(number: int) -> int:
    """The grey level of frame `number`: 8 apart, so that compression cannot confuse neighbours."""
    return 16 + 8 * (number % 28)


def frame_numbers(frames_FHWC: np.ndarray) -> list[int]:
    """Which frames of the file these are."""
    return [round((float(frame.mean()) - 16) / 8) for frame in frames_FHWC]


@pytest.fixture
def numbers() -> Callable[[np.ndarray], list[int]]:
    return frame_numbers


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    """make_clip(path, frames, size, rate, codec): a video whose frame k is a uniform grey of `level(k)`."""

    def make(
        path: Path,
        frames: int = 24,
        size: tuple[int, int] = (64, 48),
        rate: Fraction | int = 24,
        codec: str = "libx264",
        caption: str | None = None,
        offset: int = 0,
        bitrate: int | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            if bitrate:
                stream.bit_rate = bitrate
            for number in range(frames):
                picture = np.full((size[1], size[0], 3), level(number + offset), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return make


class ToyOptions(PluginOptions):
    toy_tiling: int = 0
    toy_other: int = 0
    cache_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"latents": ("toy_tiling",)}


class TeacherOptions(PluginOptions):
    teacher_size: int = 4
    cache_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"features": ("teacher_size",)}


class Encoder:
    """A part of the model that can be counted while it lives."""


@dataclass
class ToyPlugins:
    """Duck-typed `PluginSet`: counts what is loaded and encoded. `bad`: captions or levels that encode to NaN."""

    with_features: bool = False
    version: str = "1.0"
    bad: float | str | None = None
    loaded: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    text_calls: list[int] = field(default_factory=list)
    clip_calls: list[tuple[int, ...]] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    most_alive: int = 0
    _alive: list[weakref.ref] = field(default_factory=list)

    @property
    def family(self) -> Any:
        return self.plugins[0]

    @property
    def plugins(self) -> list[Any]:
        family = SimpleNamespace(name="toy", version=self.version, implementations={"describe_model": None})
        teacher = SimpleNamespace(name="teacher", version=self.version, implementations={"encode_features": None})
        return [family, teacher] if self.with_features else [family]

    def has(self, hook: str) -> bool:
        return hook == "encode_features" and self.with_features

    def load_model(self, run: Run, part: Part) -> Encoder:
        encoder = Encoder()
        self.loaded.append(part.value)
        self._alive.append(weakref.ref(encoder))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self._alive))
        return encoder

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self._alive)

    def encode_text(self, run: Run, encoder: Encoder, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        self.text_calls.append(len(captions))
        self.captions += captions
        return [
            {"text_LD": torch.full((len(caption) + 1, 2), float("nan") if caption == self.bad else len(caption) / 7)}
            for caption in captions
        ]

    def encode_latents(self, run: Run, vae: Encoder, pixels_BCFHW: torch.Tensor) -> dict[str, torch.Tensor]:
        assert not torch.is_grad_enabled()
        assert pixels_BCFHW.dtype == torch.float32
        assert pixels_BCFHW.abs().max() <= 1
        self.clip_calls.append(tuple(pixels_BCFHW.shape))
        latents = torch.nn.functional.avg_pool3d(pixels_BCFHW, (1, 8, 8))[:, :, ::4]
        if self.bad is not None and not isinstance(self.bad, str):
            latents = torch.where((latents - self.bad).abs() < 0.02, torch.nan, latents)
        return {"latents": latents.half(), "first_latent": latents[:, :, :1]}

    def encode_features(self, run: Run, clip: Any) -> dict[str, torch.Tensor]:
        self.clips.append(clip.key)
        return {"teacher/mean": torch.from_numpy(clip.frames_FHWC.mean(axis=(1, 2, 3))).half()}


@pytest.fixture
def toy_plugins() -> type[ToyPlugins]:
    return ToyPlugins


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(entries, **config): a run whose datasets are `entries`, in a folder of its own."""

    def make(
        entries: list[dict[str, Any]],
        *,
        flavour: str = "t2v",
        options: Mapping[str, PluginOptions] | None = None,
        model_path: Path | str | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Run:
        values = {"output_dir": str(tmp_path / "out"), "resolution": 64, "frame_rate": 24, **config}
        settings = RunConfig.model_validate({"caption_dropout_probability": 0, **values})
        datasets, problems = read_datasets(entries, settings)
        assert not problems, "\n".join(map(str, problems))
        flavours = {
            "t2v": Flavour("t2v", "text to video"),
            "i2v": Flavour("i2v", "image to video", conditioning=frozenset({"first_frame"})),
        }
        card = ModelCard("toy", "a toy", "video", flavours, flavour, SPEC, ".*")
        return Run(
            settings,
            options or {"toy": ToyOptions()},
            card,
            datasets,
            model_path,
            torch.device("cpu"),
            weight_dtype=dtype,
            compute_dtype=dtype,
        )

    return make


@pytest.fixture
def options() -> Any:
    """The option models of the toy plugins."""
    return SimpleNamespace(toy=ToyOptions, teacher=TeacherOptions)


@pytest.fixture(scope="session")
def clip_originals(tmp_path_factory: pytest.TempPathFactory, make_clip: Callable[..., Path]) -> Path:
    """Three good clips of two shapes, a short one, one without a caption, and a broken one."""
    folder = tmp_path_factory.mktemp("originals")
    make_clip(folder / "a.mp4", caption="a red fox\nan animal")
    make_clip(folder / "b.mp4", caption="a blue whale", offset=3)
    make_clip(folder / "tall" / "c.mp4", size=(48, 64), caption="a tall tree")
    make_clip(folder / "short.mp4", frames=7, caption="too short")
    make_clip(folder / "mute.mp4", offset=5)
    (folder / "broken.mp4").write_bytes(b"this is no video")
    (folder / "broken.txt").write_text("broken")
    return folder


@pytest.fixture
def clips(tmp_path: Path, clip_originals: Path) -> Path:
    """A copy of these clips for one test."""
    return Path(shutil.copytree(clip_originals, tmp_path / "clips"))


@pytest.fixture
def entry(clips: Path) -> dict[str, Any]:
    """A dataset entry of that folder: 17 frames at 24 fps."""
    return {
        "id": "pets",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": str(clips),
        "caption_strategy": "textfile",
        "video": {"num_frames": 17, "min_frames": 17, "frame_rate": 24},
    }
