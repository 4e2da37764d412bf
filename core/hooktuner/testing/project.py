"""A whole project on disk: clips, `datasets.json` and a `config.json` that trains in seconds on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hooktuner.testing.media import make_clips


def make_project(
    folder: Path,
    *,
    family: str = "toy",
    flavour: str | None = None,
    clips: int = 2,
    frames: int = 9,
    size: tuple[int, int] = (32, 32),
    rate: float = 8.0,
    dataset: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write clips, datasets file and config under `folder`, and return the path of `config.json`.

    Run it with `hooktuner.run(path, plugins=[ToyFamily()])`, or `tuner run` for an installed family. flavour: None
    leaves the choice to the family. size: (width, height) of the clips, which are trained at their own size. dataset:
    further keys of the dataset. `config`: further keys of the config; a key with the value None is left out. All
    paths in the files are absolute, so the working directory does not matter.
    """
    folder = folder.resolve()
    make_clips(folder / "clips", count=clips, frames=frames, size=size, rate=rate)
    datasets = [
        {
            "id": "clips",
            "type": "local",
            "dataset_type": "video",
            "instance_data_dir": str(folder / "clips"),
            "caption_strategy": "textfile",
            "resolution": min(size),
            "resolution_type": "pixel",
            "video": {"num_frames": frames, "min_frames": frames, "frame_rate": rate},
            **(dataset or {}),
        },
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True},
    ]
    values: dict[str, Any] = {
        "model_family": family,
        "model_flavour": flavour,
        "model_type": "lora",
        "lora_rank": 4,
        "data_backend_config": str(folder / "datasets.json"),
        "output_dir": str(folder / "output"),
        "cache_dir": str(folder / "cache"),
        "frame_rate": rate,
        "mixed_precision": "no",
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "checkpoint_step_interval": 2,
        "validation_disable": True,
        "seed": 1,
        **config,
    }
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "datasets.json").write_text(json.dumps(datasets, indent=2), encoding="utf-8")
    path = folder / "config.json"
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    return path
