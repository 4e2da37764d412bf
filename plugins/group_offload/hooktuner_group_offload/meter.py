"""Bytes, copy times and stalls of each optimizer step. Times are those of CUDA events; without CUDA there are none."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Span = tuple[Any, Any]
"""Two recorded `torch.cuda.Event`s with timing."""


@dataclass
class _Count:
    number: int
    nbytes: int = 0
    copies: list[Span] = field(default_factory=list)
    stalls: list[Span] = field(default_factory=list)


class Meter:
    """`open` begins a step; `report` closes the oldest open one (on a GPU, the next one has begun by then)."""

    def __init__(self) -> None:
        self._steps: deque[_Count] = deque()
        self._now = _Count(0)

    def open(self, number: int) -> None:
        """From here on counts the optimizer step `number`; opening it again changes nothing."""
        if self._now.number != number or not self._steps:
            self._now = _Count(number)
            self._steps.append(self._now)

    def copied(self, nbytes: int, span: Span | None = None) -> None:
        """Bytes went to the device."""
        self._now.nbytes += nbytes
        if span is not None:
            self._now.copies.append(span)

    def stalled(self, span: Span) -> None:
        """The computation waited for a copy between two events."""
        self._now.stalls.append(span)

    def report(self) -> dict[str, float]:
        """`bytes_h2d`, `stall_seconds`, and `hidden_fraction` (the share of copy time that nobody waited for)."""
        step = self._steps.popleft() if self._steps else _Count(0)
        copying, stall = _seconds(step.copies), _seconds(step.stalls)
        hidden = min(max(1 - stall / copying, 0.0), 1.0) if copying > 0 else 0.0
        return {"bytes_h2d": step.nbytes, "stall_seconds": stall, "hidden_fraction": hidden}


def _seconds(spans: list[Span]) -> float:
    total = 0.0
    for start, end in spans:
        end.synchronize()  # recorded before the step's numbers were, except for a copy made for the next step
        total += start.elapsed_time(end) / 1000
    return total


class TransferWatch:
    """Says once that a run waits for copies, and which setting helps. `LIMIT`: stalled share of the wall time."""

    LIMIT = 0.1
    STEPS = 3

    def __init__(self, advice: str) -> None:
        self.advice = advice
        self._stalls: deque[tuple[float, float]] = deque(maxlen=self.STEPS)
        self._told = False

    def look(self, report: Mapping[str, float], seconds: float) -> str | None:
        """The sentence, after `STEPS` steps in a row of which more than `LIMIT` was waiting."""
        self._stalls.append((report["stall_seconds"], seconds))
        stalled = sum(stall for stall, _ in self._stalls)
        whole = sum(wall for _, wall in self._stalls)
        if self._told or len(self._stalls) < self.STEPS or stalled <= self.LIMIT * whole:
            return None
        self._told = True
        return (
            f"group-offload: {stalled / whole:.0%} of the time is spent waiting for weights "
            f"({report['bytes_h2d'] / 2**30:.1f} GiB per step, {report['hidden_fraction']:.0%} of the copying is "
            f"hidden). {self.advice}"
        )
