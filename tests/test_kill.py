"""Resume is bit-exact under SIGKILL, at whatever moment: while scanning, caching, training, or saving."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import hooktuner
import hooktuner.train.loop  # what a run imports is imported before the forks
import hooktuner_kandinsky5_video.load  # noqa: F401
import pytest
from hooktuner.testing import make_project
from rich.console import Console

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]

STEPS = 24
KEYS = {
    "flavour": "tiny", "clips": 6, "frames": 9, "size": (64, 64), "max_train_steps": STEPS, "train_batch_size": 2,
    "checkpoint_step_interval": 2, "checkpoints_total_limit": 2, "lora_dropout": 0.1, "learning_rate": 1e-3,
    "caption_dropout_probability": 0.3, "gradient_accumulation_steps": 2,
}  # fmt: skip
MOMENTS = 10


def run(config: Path) -> None:
    """The body of a process that is killed: a whole run, as `tuner run` does it."""
    hooktuner.run(config, console=Console(quiet=True))


def start(config: Path) -> multiprocessing.process.BaseProcess:
    """A run in a process of its own; forked, because importing torch anew takes longer than the run itself."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(config,))
    process.start()
    return process


def finish(config: Path) -> None:
    process = start(config)
    process.join(timeout=240)
    assert process.exitcode == 0


def files_of(project: Path) -> dict[str, bytes]:
    """The last checkpoint and the metrics, byte for byte."""
    output = project / "output"
    last = output / f"checkpoints/step-{STEPS:06d}"
    files = {
        str(path.relative_to(last)): path.read_bytes()
        for path in last.rglob("*")
        if path.is_file() and path.name != "config.resolved.json"  # it holds the run folder's own path
    }
    return {**files, "metrics.jsonl": (output / "metrics.jsonl").read_bytes()}


def progress_of(project: Path) -> int:
    """A number that grows while a run goes on: cache entries, then lines of metrics, then checkpoints."""
    cache, output = project / "cache", project / "output"
    entries = sum(1 for _ in cache.rglob("*.safetensors"))
    metrics = output / "metrics.jsonl"
    lines = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    return entries + lines + sum(1 for _ in (output / "checkpoints").glob("*"))


def test_ten_kills_change_no_bit(tmp_path):
    whole = make_project(tmp_path / "whole", family="kandinsky5-video", **KEYS)
    finish(whole)
    expected = files_of(tmp_path / "whole")

    killed = make_project(tmp_path / "killed", family="kandinsky5-video", **KEYS)
    draws = random.Random(7)
    kills: list[int] = []
    for _ in range(MOMENTS):
        process = start(killed)
        before = progress_of(tmp_path / "killed")
        deadline = time.monotonic() + 120
        wanted = before + draws.choice((1, 2, 3, 5))
        while process.is_alive() and progress_of(tmp_path / "killed") < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draws.random() * 0.05)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills.append(progress_of(tmp_path / "killed"))
        process.join()
        for path in (tmp_path / "killed/output/checkpoints").glob("step-*"):
            assert (path / "state/run.json").is_file(), f"{path} stands although it is not complete"
    assert len(kills) == MOMENTS, "the run ended before it was killed often enough: raise STEPS"
    finish(killed)
    found = files_of(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list((tmp_path / "killed/output/checkpoints").glob(".partial-*"))
