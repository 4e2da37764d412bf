"""Two processes train what one does: for a fixed global batch the number of processes does not matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hooktuner
import pytest
import torch
from hooktuner.testing import ToyFamily, make_project
from rich.console import Console
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, hooktuner
from rich.console import Console
from hooktuner.testing import ToyFamily
hooktuner.run(sys.argv[1], plugins=[ToyFamily], console=Console(quiet=True))
"""


def lines(project: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (project / "output/metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_like_one_with_twice_the_accumulation(tmp_path):
    keys = {"clips": 5, "max_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-3}
    one = make_project(tmp_path / "one", gradient_accumulation_steps=2, **keys)
    hooktuner.run(one, plugins=[ToyFamily], console=Console(quiet=True))
    two = make_project(tmp_path / "two", gradient_accumulation_steps=1, **keys)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, str(two)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    single, double = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(double) == len(single) == 4  # one process writes
    for a, b in zip(single, double, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    adapters = [
        load_file(tmp_path / name / "output/checkpoints/step-000004/pytorch_lora_weights.safetensors")
        for name in ("one", "two")
    ]
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=0.05, atol=1e-4)
