"""From files to batches: datasets (config) · media · captions · index (SQLite) · buckets and plan · cache and encode ·
loader. `prepare` is the door; the names below are what a run needs, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooktuner.data.datasets import conditioning_problems, frame_problems, read_datasets
    from hooktuner.data.entries import Dataset, ImageDataset, TextEmbedsDataset, VideoDataset
    from hooktuner.data.loader import Loader, sigma_law
    from hooktuner.data.media import write_image, write_video
    from hooktuner.data.plan import DataPlan
    from hooktuner.data.prepare import TrainingData, build_caches, cache_folder, index_datasets
    from hooktuner.data.progress import PreparationStopped

_HOMES = {
    "datasets": ("conditioning_problems", "frame_problems", "read_datasets"),
    "entries": ("Dataset", "ImageDataset", "TextEmbedsDataset", "VideoDataset"),
    "loader": ("Loader", "sigma_law"),
    "media": ("write_image", "write_video"),
    "plan": ("DataPlan",),
    "prepare": ("TrainingData", "build_caches", "cache_folder", "index_datasets"),
    "progress": ("PreparationStopped",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DataPlan",
    "Dataset",
    "ImageDataset",
    "Loader",
    "PreparationStopped",
    "TextEmbedsDataset",
    "TrainingData",
    "VideoDataset",
    "build_caches",
    "cache_folder",
    "conditioning_problems",
    "frame_problems",
    "index_datasets",
    "read_datasets",
    "sigma_law",
    "write_image",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hooktuner.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hooktuner.data.{_HOME_OF[name]}"), name)
