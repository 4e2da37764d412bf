"""Every exception hooktuner raises on purpose, and how its message is written.

    HooktunerError             exit code 2, printed without a traceback
    ├── ConfigError            one or many `Problem`s in a config or datasets file
    ├── PluginError            a plugin that is unknown, broken, or disagrees with another
    ├── DataError              media, captions, caches
    ├── ModelError             a model family cannot do what the config asks
    ├── CheckpointError        a checkpoint is missing, incomplete, or from another run
    └── TrainingError          training itself went wrong (exit code 1)
        └── NonFiniteLossError

A message has three parts: what (a JSON path, file or plugin), why, and what to do. `Problem` keeps them apart.
Anything that is not a `HooktunerError` is a bug (ours or a plugin's) and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where — why. fix`."""

    where: str
    why: str
    fix: str = ""

    def __str__(self) -> str:
        why = self.why if self.why.endswith((".", "?", "!")) else self.why + "."
        return f"{self.where} — {why} {self.fix}".rstrip()


class HooktunerError(Exception):
    """Base of all deliberate errors. `exit_code` is what the command line ends with."""

    exit_code = 2


class ConfigError(HooktunerError):
    """All problems of a configuration at once. `problems` keeps them for programs."""

    def __init__(self, problems: Sequence[Problem] | Problem) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class PluginError(HooktunerError):
    """A plugin is unknown, cannot be imported, breaks a hook's contract, or collides with another."""


class DataError(HooktunerError):
    """A dataset, a caption source or a cache cannot be used."""


class ModelError(HooktunerError):
    """A model family cannot do what the configuration asks of it, or its checkpoint cannot be loaded."""


class CheckpointError(HooktunerError):
    """A checkpoint is missing, incomplete, or does not fit the run that wants to resume from it."""


class TrainingError(HooktunerError):
    """Training went wrong although the configuration was right."""

    exit_code = 1


class NonFiniteLossError(TrainingError):
    """The loss or a gradient was NaN or infinite; the optimizer did not move."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean "learning_rate"?` for the nearest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'Did you mean "{close[0]}"?' if close else ""
