"""Group offload on the real model families: whole runs with and without it end with the same bits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import hooktuner
import pytest
from hooktuner.testing import make_project
from rich.console import Console

pytestmark = pytest.mark.filterwarnings(  # diffusers normalises float32 queries with bfloat16 weights
    "ignore:Mismatch dtype between input and weight:UserWarning"
)
BF16: dict[str, Any] = {"mixed_precision": "bf16"}


def run(folder: Path, family: str, flavour: str, **config: Any) -> dict[str, Any]:
    folder.mkdir()
    values = {"max_train_steps": 2, "lora_rank": 2, "frames": 5, "size": (32, 32), **config}
    path = make_project(folder, family=family, flavour=flavour, train_batch_size=2, **values)
    result = hooktuner.run(path, plugins=[family], console=Console(file=io.StringIO()))
    assert result.checkpoint is not None
    timings = (result.output_dir / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "metrics": (result.output_dir / "metrics.jsonl").read_bytes(),
        "files": {
            str(path.relative_to(result.checkpoint)): path.read_bytes()
            for path in result.checkpoint.rglob("*.safetensors")
        },
        "media": [path.read_bytes() for path in result.validation_files],
        "bytes": [json.loads(line).get("bytes_h2d") for line in timings],
    }


@pytest.mark.parametrize(
    ("family", "flavour", "kind", "how"),
    [
        ("kandinsky5-video", "tiny", "block_level", BF16),
        ("kandinsky5-video", "tiny", "leaf_level", BF16),
        ("kandinsky5-video", "tiny", "block_level", {"gradient_checkpointing": False}),
        ("kandinsky5-video", "tiny-i2v", "block_level", BF16),
    ],
)
def test_offload_changes_no_bit(tmp_path: Path, family: str, flavour: str, kind: str, how: dict[str, Any]) -> None:
    """Several denoiser calls per micro-step (unequal captions), modules kept in float32."""
    without = run(tmp_path / "without", family, flavour, **how)
    offload = {"enable_group_offload": True, "group_offload_type": kind, "group_offload_ring_depth": 1}
    found = run(tmp_path / "with", family, flavour, **how, **offload)
    assert all(found.pop("bytes"))
    assert without.pop("bytes") == [None, None]
    assert found == without


@pytest.mark.parametrize(("family", "flavour"), [("kandinsky5-video", "tiny")])
def test_validation_is_the_same(tmp_path: Path, family: str, flavour: str) -> None:
    how = {
        "validation_disable": False,
        "validation_prompt": "a dog",
        "validation_step_interval": 1,
        "validation_num_inference_steps": 2,
        "validation_resolution": "32x32",
        "validation_num_video_frames": 5,
    }
    without = run(tmp_path / "without", family, flavour, **how)
    found = run(tmp_path / "with", family, flavour, **how, enable_group_offload=True)
    assert found["media"]
    assert (found["media"], found["files"]) == (without["media"], without["files"])
