"""`make_project` writes a project that trains as it stands."""

from __future__ import annotations

import io
import json
from pathlib import Path

import hooktuner
import pytest
from hooktuner.testing import ToyFamily, make_project
from rich.console import Console
from safetensors.torch import load_file


@pytest.mark.parametrize("flavour", [None, "toy-i2v"])
def test_it_trains(flavour: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any working directory, two steps on every clip leave an adapter."""
    path = make_project(tmp_path / "project", flavour=flavour, clips=3)
    monkeypatch.chdir(tmp_path)
    result = hooktuner.run(path, plugins=[ToyFamily()], console=Console(file=io.StringIO()))
    assert result.steps == 2
    assert result.output_dir == tmp_path / "project" / "output"
    assert result.checkpoint is not None
    adapter = load_file(result.checkpoint / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for key, value in adapter.items() if "lora_B" in key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]


def test_keys_can_be_added_changed_and_left_out(tmp_path: Path) -> None:
    changes = {"lora_rank": 8, "learning_rate": None, "lr_warmup_steps": 1}
    path = make_project(tmp_path, dataset={"repeats": 3}, size=(48, 32), **changes)
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["lora_rank"] == 8
    assert config["lr_warmup_steps"] == 1
    assert "learning_rate" not in config
    assert "model_flavour" not in config
    dataset, text = json.loads((tmp_path / "datasets.json").read_text(encoding="utf-8"))
    assert (dataset["repeats"], dataset["resolution"]) == (3, 32)
    assert text["dataset_type"] == "text_embeds"
