"""Numbers of a run: files, trackers, and the live display.

`metrics.jsonl` holds one line per optimizer step with what training computed, and nothing that depends on the
machine's speed: two equal runs write equal bytes, also when one of them was killed and resumed. Seconds and memory
are in `timings.jsonl`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hooktuner.step import StepResult
from hooktuner.train.engine import Engine

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"


class MetricsWriter:
    """Appends to the two files of a run folder and feeds the trackers. Only the main process writes."""

    def __init__(self, output_dir: Path, engine: Engine, *, after_step: int) -> None:
        """`after_step`: lines of later steps, left by a run that went on after its checkpoint, are removed."""
        self._engine = engine
        self._files = []
        if engine.is_main:
            for name in (METRICS_FILE, TIMINGS_FILE):
                truncate_after(output_dir / name, after_step)
                self._files.append(open(output_dir / name, "a", encoding="utf-8"))  # noqa: SIM115

    def write(self, result: StepResult, seconds: float, more: Mapping[str, float] | None = None) -> None:
        """One finished step; `seconds` is its wall time, `more` further numbers for `timings.jsonl`."""
        numbers = {"loss": result.loss, **{f"loss/{name}": value for name, value in result.terms.items()}}
        numbers |= result.metrics
        metrics = {"step": result.number, "epoch": result.epoch, **numbers, "lr": result.learning_rate}
        metrics["grad_norm"] = result.grad_norm
        timings = {
            "step": result.number,
            "seconds": round(seconds, 6),
            "memory_bytes": memory_bytes(self._engine.device),
            **(more or {}),
        }
        for file, line in zip(self._files, (metrics, timings), strict=False):
            file.write(json.dumps(line) + "\n")
        self._engine.track({key: value for key, value in metrics.items() if key != "step"}, result.number)

    def flush(self) -> None:
        """Put everything on disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        for file in self._files:
            file.close()
        self._files = []


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def in_bytes(count: float) -> str:
    """A number of bytes for people: `9.83 GiB`, `1.4 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class Display(Protocol):
    """Shows finished steps while a run goes on."""

    def update(self, result: StepResult, seconds: float) -> None:
        """One finished step and its wall time in seconds."""
        ...


class _Pace:
    """Smoothed loss and seconds per step, and what they say about the end."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seconds: float | None = None
        self._loss: float | None = None

    def fields(self, result: StepResult, seconds: float, device: torch.device) -> dict[str, Any]:
        self._seconds = seconds if self._seconds is None else 0.9 * self._seconds + 0.1 * seconds
        self._loss = result.loss if self._loss is None else 0.95 * self._loss + 0.05 * result.loss
        left = self._seconds * (self._total - result.number)
        return {
            "loss": f"{self._loss:.4f}",
            "lr": f"{result.learning_rate:.2e}",
            "pace": f"{self._seconds:.3g} s/step",
            "eta": time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 86400:.1f} d",
            "memory": in_bytes(memory_bytes(device)),
        }


class _LiveLine:
    """A progress bar with loss, lr, s/step, ETA and memory, for terminals."""

    def __init__(self, progress: Progress, total: int, done: int, device: torch.device) -> None:
        self._device = device
        self._progress = progress
        self._pace = _Pace(total)
        fields: dict[str, Any] = {"loss": "–", "lr": "–", "pace": "– s/step", "eta": "–", "memory": ""}
        self._task: TaskID = progress.add_task("training", total=total, completed=done, **fields)

    def update(self, result: StepResult, seconds: float) -> None:
        self._progress.update(self._task, completed=result.number, **self._pace.fields(result, seconds, self._device))


class _Lines:
    """About twenty plain lines over a run, for log files."""

    def __init__(self, console: Console, total: int, done: int, device: torch.device) -> None:
        self._console, self._total, self._device = console, total, device
        self._every = max((total - done) // 20, 1)
        self._first = done + 1
        self._pace = _Pace(total)

    def update(self, result: StepResult, seconds: float) -> None:
        fields = self._pace.fields(result, seconds, self._device)
        if (result.number - self._first) % self._every == 0 or result.number == self._total:
            self._console.print(
                f"step {result.number}/{self._total}  loss {fields['loss']}  lr {fields['lr']}  {fields['pace']}  "
                f"ETA {fields['eta']}  {fields['memory']}",
                highlight=False,
                soft_wrap=True,
            )


@contextmanager
def live_display(console: Console, total: int, done: int, device: torch.device) -> Iterator[Display]:
    """The display of a run of `total` steps of which `done` are done: a bar on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield _Lines(console, total, done, device)
        return
    columns = (
        TextColumn("[bold]training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[pace]}  ETA {task.fields[eta]}"),
        TextColumn("{task.fields[memory]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield _LiveLine(progress, total, done, device)
