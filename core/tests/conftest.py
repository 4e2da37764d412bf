"""Fake plugins: distributions on disk with entry points, found and imported the way that installed ones are."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hooktuner import discovery
from hooktuner.hookspecs import GROUP

FAMILY = '''
from hooktuner import Flag, Flavour, FrameRule, LatentSpec, ModelCard, PluginOptions, Problem, hookimpl
from pydantic import Field

class Options(PluginOptions):
    NAME_tiling: Flag = Field(default=False, description="Encode in tiles.")
    NAME_margin: int = Field(default=8, ge=0, description="Overlap of tiles in pixels.")

    def problems(self, run):
        if self.NAME_margin > 64:
            yield Problem("NAME_margin", "is wider than a tile (64 pixels)", "Lower it.")

def check(run):
    if run.config.lora_rank > 512:
        yield Problem("lora_rank", "is larger than the model is wide", "Lower it.")

class Family:
    """A model family for tests."""

    aliases = ("NAME_old",)

    @hookimpl
    def options(self):
        return Options

    @hookimpl
    def describe_model(self, run):
        video = Flavour("small", "a small one", repository="owner/small", defaults={"flow_schedule_shift": 3.0})
        first = Flavour(
            "first-frame", "starts from a frame", repository="owner/ff", conditioning=frozenset({"first_frame"})
        )
        built = Flavour("built", "made here", build=lambda folder: (folder / "model.txt").write_text("weights"))
        return ModelCard(
            name="NAME", summary="for tests", media="video", default_flavour="small",
            flavours={flavour.name: flavour for flavour in (video, first, built)},
            latents=LatentSpec(16, 8, FrameRule(4, 121), size_multiple=16), lora_targets=".*",
            offers=frozenset({"blocks", "frames"}), check=check,
            defaults={
                "frame_rate": 24.0, "flow_schedule_shift": 5.0, "validation_resolution": "512x768",
                "validation_num_video_frames": 61, "validation_guidance": 5.0,
            },
        )

    @hookimpl
    def load_model(self, run, part):
        raise NotImplementedError

    @hookimpl
    def encode_text(self, run, encoder, captions):
        raise NotImplementedError

    @hookimpl
    def encode_latents(self, run, vae, pixels_BCFHW):
        raise NotImplementedError

    @hookimpl
    def predict(self, run, denoiser, step):
        raise NotImplementedError
'''

TECHNIQUE = '''
from hooktuner import Flag, PluginOptions, hookimpl
from pydantic import Field

class Options(PluginOptions):
    NAME_enabled: Flag | None = Field(default=None, description="Switch it on.")
    NAME_weight: float = Field(default=0.5, ge=0, description="Weight of the term.")

    def active(self):
        return self.NAME_enabled

class Technique:
    """A technique for tests."""

    needs = NEEDS

    @hookimpl
    def options(self):
        return Options

    @hookimpl
    def on_event(self, run, event):
        pass
'''


class Shelf:
    """Installs fake distributions for one test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: list[Path] = []

    def add(
        self,
        name: str,
        code: str,
        target: str,
        *,
        distribution: str | None = None,
        version: str = "0.1.0",
        group: str = GROUP,
    ) -> None:
        """A distribution with one module and one entry point."""
        distribution = distribution or f"hooktuner-{name}"
        module = distribution.replace("-", "_")
        folder = self.root / f"{len(self.folders)}"
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{target}\n")
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        self.folders.append(folder)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()

    def family(self, name: str = "films", **about: Any) -> None:
        """A model family without torch; it owns `NAME_tiling` and `NAME_margin`."""
        self.add(name, FAMILY.replace("NAME", name.replace("-", "_")), "Family", **about)

    def technique(self, name: str = "echo", needs: tuple[str, ...] = (), **about: Any) -> None:
        """A technique; it owns `NAME_enabled` and `NAME_weight`."""
        code = TECHNIQUE.replace("NAME", name.replace("-", "_")).replace("NEEDS", repr(needs))
        self.add(name, code, "Technique", **about)

    def catalogue(self, entries: dict[str, Any], *, distribution: str = "some-catalogue") -> None:
        """A catalogue of published plugins."""
        code = f"ENTRIES = {entries!r}"
        self.add("some", code, "ENTRIES", distribution=distribution, group=discovery.CATALOGUE_GROUP)

    def entry_points(self, group: str) -> list[importlib.metadata.EntryPoint]:
        """What `importlib.metadata.entry_points` would find if nothing else were installed."""
        folders = [str(folder) for folder in self.folders]
        found = importlib.metadata.distributions(path=folders)
        return [point for each in found for point in each.entry_points.select(group=group)]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    """Only the fake distributions that the test adds are installed."""
    path, modules = list(sys.path), set(sys.modules)
    shelf = Shelf(tmp_path / "shelf")
    monkeypatch.setattr(discovery, "entry_points", shelf.entry_points)
    yield shelf
    sys.path[:] = path
    names = {folder_file.stem for folder in shelf.folders for folder_file in folder.glob("*.py")}
    for name in (set(sys.modules) - modules) & names:
        del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a datasets file and its folder of clips."""
    folder = tmp_path / "project"
    (folder / "clips").mkdir(parents=True)
    (folder / "datasets.json").write_text(
        json.dumps(
            [
                {
                    "id": "clips",
                    "dataset_type": "video",
                    "instance_data_dir": "clips",
                    "video": {"num_frames": 17},
                },
                {"id": "text", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
            ]
        )
    )
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def write_config(project: Path) -> Callable[..., str]:
    """Write `config.json`: what every run needs, and the keys given."""

    def write(**keys: Any) -> str:
        config = {"model_family": "films", "data_backend_config": "datasets.json", "max_train_steps": 10}
        (project / "config.json").write_text(json.dumps({**config, **keys}))
        return "config.json"

    return write
