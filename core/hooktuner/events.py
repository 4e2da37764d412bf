"""What `on_event` is told. Plain data; paths are inside the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hooktuner.step import StepResult


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class RunStarted(Event):
    """The config is frozen and every plugin is active; nothing is loaded yet."""


@dataclass(frozen=True)
class CachingFinished(Event):
    """Captions, latents and features are on disk; encoders may be released."""


@dataclass(frozen=True)
class TrainingStarted(Event):
    """Model, adapters and optimizer stand. `first_step` is the number of the next optimizer step."""

    first_step: int
    total_steps: int


@dataclass(frozen=True)
class StepStarted(Event):
    """The optimizer step `number` begins (counted from 1)."""

    number: int


@dataclass(frozen=True)
class StepFinished(Event):
    """The numbers of a step have arrived from the device; on a GPU this is one step late."""

    result: StepResult


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A complete checkpoint stands at `path`."""

    path: Path
    step: int


@dataclass(frozen=True)
class ValidationFinished(Event):
    """Validation media were written."""

    files: tuple[Path, ...]
    step: int


@dataclass(frozen=True)
class RunEnded(Event):
    """The last event, also after an error or an interrupt. `reason`: finished, interrupted or failed."""

    reason: str
    step: int
