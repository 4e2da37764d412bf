"""What plugin authors test with, shipped with core.

| for | use |
| --- | --- |
| a model | `ToyFamily` (a whole small family), `ToyDenoiser`, `build_checkpoint` |
| files | `make_clips`, `make_images`, `broken_clip`, `draw_clip`, `write_video`, `describe_clip` |
| a project to run | `make_project` |
| hooks one by one | `make_plugins`, `make_run`, `make_batch`, `make_step`, `load_denoiser` |
| the rules every plugin keeps | `PluginConformance` (needs pytest) |

    from hooktuner.testing import PluginConformance

    class TestConformance(PluginConformance):
        plugin = "my-plugin"

Nothing here imports torch until it is used, and nothing here changes global state.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooktuner.testing.conformance import PluginConformance
    from hooktuner.testing.media import broken_clip, describe_clip, draw_clip, make_clips, make_images, write_video
    from hooktuner.testing.project import make_project
    from hooktuner.testing.runs import as_plugin, load_denoiser, make_batch, make_plugins, make_run, make_step
    from hooktuner.testing.toy import ToyFamily, ToyOptions
    from hooktuner.testing.toy_model import ToyAnatomy, ToyDenoiser
    from hooktuner.testing.toy_parts import ToyCodec, ToyPipeline, ToyTextEncoder, build_checkpoint

_HOMES = {
    "conformance": ("PluginConformance",),
    "media": ("broken_clip", "describe_clip", "draw_clip", "make_clips", "make_images", "write_video"),
    "project": ("make_project",),
    "runs": ("as_plugin", "load_denoiser", "make_batch", "make_plugins", "make_run", "make_step"),
    "toy": ("ToyFamily", "ToyOptions"),
    "toy_model": ("ToyAnatomy", "ToyDenoiser"),
    "toy_parts": ("ToyCodec", "ToyPipeline", "ToyTextEncoder", "build_checkpoint"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PluginConformance",
    "ToyAnatomy",
    "ToyCodec",
    "ToyDenoiser",
    "ToyFamily",
    "ToyOptions",
    "ToyPipeline",
    "ToyTextEncoder",
    "as_plugin",
    "broken_clip",
    "build_checkpoint",
    "describe_clip",
    "draw_clip",
    "load_denoiser",
    "make_batch",
    "make_clips",
    "make_images",
    "make_plugins",
    "make_project",
    "make_run",
    "make_step",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hooktuner.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hooktuner.testing.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
