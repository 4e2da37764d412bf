"""The plugin as core and users see it: keys, refusals, and whole runs that are equal with and without."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import hooktuner
import pytest
import torch
from hooktuner.assemble import assemble
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError
from hooktuner.testing import PluginConformance, ToyFamily, make_project
from rich.console import Console

ON = {"enable_group_offload": True}


class TestConformance(PluginConformance):
    plugin = "group-offload"
    options = ON
    neutral = ON


# ---------------------------------------------------------------------------------------------------- options


def check(*flags: str, **config: Any) -> Any:
    config = {"model_family": "toy", "max_train_steps": 1, "data_backend_config": "none.json", **config}
    return assemble(read_draft(config, list(flags), plugins=[ToyFamily]), with_datasets=False)


def test_defaults() -> None:
    options = check(**ON).run.options["group-offload"]
    assert options.model_dump() == {
        "enable_group_offload": True,
        "group_offload_type": "block_level",
        "group_offload_blocks_per_group": 1,
        "group_offload_use_stream": True,
        "group_offload_to_disk_path": None,
        "group_offload_resident_blocks": None,
        "group_offload_ring_depth": 2,
        "enable_model_cpu_offload": None,
    }


@pytest.mark.parametrize("flags", [["--enable_group_offload"], ["--enable_group_offload=true"]])
def test_the_switch(flags: list[str]) -> None:
    assert "group-offload" in check(*flags).plugins.lock()
    assert "group-offload" not in check(enable_group_offload=False).plugins.lock()
    assert "group-offload" not in check(enable_group_offload=False, enable_model_cpu_offload="false").plugins.lock()


FULL = (
    "enable_group_offload — group offload streams frozen weights, and model_type full trains all of them, so that "
    'nothing could be streamed. Use "model_type": "lora", or remove enable_group_offload.'
)
BOTH = (
    "enable_model_cpu_offload — it cannot be combined with enable_group_offload, because both would decide where the "
    "same weights live. Remove enable_model_cpu_offload."
)
ALONE = (
    "enable_model_cpu_offload — it moves whole models between the stages of sampling, and training needs the denoiser "
    'in every step. Use "enable_group_offload": true instead.'
)
LEAVES = (
    "group_offload_blocks_per_group — with group_offload_type leaf_level a group is one layer, not several blocks. "
    'Remove it, or use "group_offload_type": "block_level".'
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**ON, "model_type": "full"}, FULL),
        ({**ON, "enable_model_cpu_offload": True}, BOTH),
        ({"enable_model_cpu_offload": True}, ALONE),
        ({"enable_model_cpu_offload": True, "enable_group_offload": False}, ALONE),
        ({**ON, "group_offload_type": "leaf_level", "group_offload_blocks_per_group": 2}, LEAVES),
        ({**ON, "group_offload_to_disk_path": " "}, "group_offload_to_disk_path — is empty. Name a folder"),
        ({**ON, "group_offload_to_disk_path": __file__}, "is a file. Name a folder; it is made if need be."),
        ({**ON, "group_offload_ring_depth": 0}, "group_offload_ring_depth"),
        ({**ON, "group_offload_blocks_per_group": 0}, "group_offload_blocks_per_group"),
        ({**ON, "group_offload_resident_blocks": -1}, "group_offload_resident_blocks"),
        ({**ON, "group_offload_type": "layer"}, "group_offload_type"),
        ({"group_offload_type": "leaf_level"}, "Activate it with --plugin group-offload"),
    ],
)
def test_refusals(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(**config)
    assert message in str(refused.value)


def test_refusals_are_in_the_readme() -> None:
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split())
    for message in (FULL, BOTH, ALONE, LEAVES):
        assert message.partition(" — ")[2].partition(". ")[0] in readme


# ---------------------------------------------------------------------------------------------------- whole runs


def run(folder: Path, further: list[Any] | None = None, **config: Any) -> dict[str, Any]:
    folder.mkdir()
    out = io.StringIO()
    path = make_project(
        folder, family="toy", **{"max_train_steps": 3, "gradient_accumulation_steps": 2, "lora_rank": 2, **config}
    )
    result = hooktuner.run(path, plugins=[ToyFamily(), *(further or [])], console=Console(file=out, width=1000))
    assert result.checkpoint is not None
    files = {str(p.relative_to(result.checkpoint)): p.read_bytes() for p in result.checkpoint.rglob("*.safetensors")}
    return {
        "metrics": (result.output_dir / "metrics.jsonl").read_bytes(),
        "files": files,
        "timings": [json.loads(line) for line in (result.output_dir / "timings.jsonl").read_text().splitlines()],
        "said": out.getvalue(),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"group_offload_blocks_per_group": 2, "group_offload_ring_depth": 3},
        {"group_offload_type": "leaf_level"},
        {"group_offload_to_disk_path": "rest"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
@pytest.mark.parametrize(
    "how",
    [{}, {"gradient_checkpointing": False, "mixed_precision": "bf16"}, {"lora_dropout": 0.2}],
    ids=["checkpointing", "none-bf16", "dropout"],
)
def test_runs_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Metrics, exported adapter and optimizer state, byte by byte, from a memory-mapped checkpoint."""
    monkeypatch.chdir(tmp_path)
    without, streamed = run(tmp_path / "without", **how), run(tmp_path / "with", **how, **ON, **settings)
    assert without["metrics"] == streamed["metrics"]
    assert without["files"] == streamed["files"]
    assert any("pytorch_lora_weights" in name for name in streamed["files"])
    assert all(line["bytes_h2d"] > 0 for line in streamed["timings"][:1])
    assert {"stall_seconds", "hidden_fraction"} <= streamed["timings"][0].keys()
    assert "a simulation in main memory" in streamed["said"]
    assert not (tmp_path / "rest").exists() or not list((tmp_path / "rest").iterdir())


class RunsOutOfMemory:
    """Raises once, in the middle of a backward pass."""

    def __init__(self) -> None:
        self.left = 1

    @hooktuner.hookimpl
    def intercept_blocks(self, model: Any) -> None:
        def fail(gradient: torch.Tensor) -> None:
            if self.left:
                self.left -= 1
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")

        model.blocks[1].attention.to_q.lora_A["default"].weight.register_hook(fail)


def test_out_of_memory_repeats_the_step(tmp_path: Path) -> None:
    """The run ends with the same bits, and the user is told while it runs."""
    without, planted = run(tmp_path / "without"), RunsOutOfMemory()
    settings = {**ON, "group_offload_resident_blocks": 2}
    found = run(tmp_path / "with", [planted], **settings)
    assert planted.left == 0
    assert (found["metrics"], found["files"]) == (without["metrics"], without["files"])
    assert "ran out of memory while 2 of 5 blocks stay on the device" in found["said"]


def test_out_of_memory_for_good(tmp_path: Path) -> None:
    planted = RunsOutOfMemory()
    planted.left = 2
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        run(tmp_path / "with", [planted], **ON, group_offload_resident_blocks=2)
