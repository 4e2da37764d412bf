"""The plugin as core sees it, in whole runs."""

from __future__ import annotations

import io
import json

import hooktuner
from hooktuner.testing import PluginConformance, ToyFamily, make_project
from rich.console import Console
from safetensors import safe_open

OPTIONS = {
    "scheduled_sampling_max_step_offset": 60,
    "scheduled_sampling_prob_start": 0.5,
    "scheduled_sampling_prob_end": 1.0,
    "scheduled_sampling_ramp_steps": 3,
    "scheduled_sampling_reflexflow": True,
    "train_batch_size": 2,
    "lora_dropout": 0.1,
}


class TestConformance(PluginConformance):
    plugin = "scheduled-sampling"
    options = OPTIONS
    neutral = {"scheduled_sampling_max_step_offset": 60, "train_batch_size": 1, "lora_dropout": 0.0}  # noqa: RUF012


def train(folder, **config):
    path = make_project(folder, **{"max_train_steps": 3, **config})
    result = hooktuner.run(path, plugins=[ToyFamily()], console=Console(file=io.StringIO()))
    adapter = sorted(result.checkpoint.rglob("*.safetensors"))
    return result, {str(file.relative_to(result.checkpoint)): file.read_bytes() for file in adapter}


def test_an_offset_of_zero_is_the_plain_run_bit_for_bit(tmp_path):
    plain, plain_files = train(tmp_path / "plain")
    keys = {"scheduled_sampling_max_step_offset": 0, "scheduled_sampling_probability": 1.0}
    off, off_files = train(tmp_path / "off", **keys)
    assert list(off.losses) == list(plain.losses)
    assert off_files == plain_files


def test_rollouts_change_training_and_are_logged_and_nothing_of_them_is_exported(tmp_path):
    plain, plain_files = train(tmp_path / "plain")
    keys = {"scheduled_sampling_max_step_offset": 40, "scheduled_sampling_probability": 1.0}
    on, on_files = train(tmp_path / "on", **keys, scheduled_sampling_reflexflow=True)
    assert list(on.losses) != list(plain.losses)
    assert on_files.keys() == plain_files.keys()
    names = []
    for folder in ("plain", "on"):
        (file,) = (tmp_path / folder / "output/checkpoints").glob("*3/*lora*.safetensors")
        with safe_open(file, "pt") as tensors:
            names.append(sorted(tensors.keys()))
    assert names[0] == names[1]
    lines = [json.loads(line) for line in (tmp_path / "on/output/metrics.jsonl").read_text().splitlines()]
    assert all(line["scheduled-sampling/rolled"] == 1 for line in lines)
    assert all(line["loss/scheduled-sampling/anti_drift"] > 0 for line in lines)
    assert all("loss/scheduled-sampling/frequency" in line for line in lines)
