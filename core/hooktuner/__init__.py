"""hooktuner fine-tunes diffusion transformers for image and video, one plugin per model and per technique.

    import hooktuner
    result = hooktuner.run("config.json", plugins=["some-family", MyHooks()])

Names in `__all__` are the public interface. Nothing here imports torch until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hooktuner.hookspecs import hookimpl

if TYPE_CHECKING:
    from hooktuner.config import Flag, PluginOptions, RunConfig
    from hooktuner.context import Run
    from hooktuner.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        HooktunerError,
        ModelError,
        PluginError,
        Problem,
        TrainingError,
    )
    from hooktuner.family import (
        Anatomy,
        BlockTokens,
        Flavour,
        FrameRule,
        Grid,
        Keepable,
        LatentSpec,
        ModelCard,
        Part,
        SampleRequest,
        SamplingPipeline,
    )
    from hooktuner.plugins import PluginSet
    from hooktuner.step import Batch, Conditioning, Step, StepResult
    from hooktuner.story import RunResult, run
    from hooktuner.technique import BlockCall, BlockInterceptor, Clip, OffloadStrategy, Regularizer

__version__ = "0.1.0"

_HOMES = {
    "config": ("Flag", "PluginOptions", "RunConfig"),
    "context": ("Run",),
    "errors": (
        "CheckpointError", "ConfigError", "DataError", "HooktunerError", "ModelError", "PluginError", "Problem",
        "TrainingError",
    ),
    "family": (
        "Anatomy", "BlockTokens", "Flavour", "FrameRule", "Grid", "Keepable", "LatentSpec", "ModelCard", "Part",
        "SampleRequest", "SamplingPipeline",
    ),
    "plugins": ("PluginSet",),
    "story": ("RunResult", "run"),
    "step": ("Batch", "Conditioning", "Step", "StepResult"),
    "technique": ("BlockCall", "BlockInterceptor", "Clip", "OffloadStrategy", "Regularizer"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", "hookimpl", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hooktuner' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hooktuner.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
