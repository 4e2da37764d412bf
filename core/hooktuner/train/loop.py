"""The steps of a run, from a position to the end or an interrupt; saves and validates on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from hooktuner import events
from hooktuner.context import Run
from hooktuner.data import Loader
from hooktuner.plugins import PluginSet
from hooktuner.step import Batch
from hooktuner.train import checkpoint
from hooktuner.train.checkpoint import Position
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel, PendingResult
from hooktuner.train.metrics import Display, MetricsWriter, live_display
from hooktuner.train.optim import learning_rate
from hooktuner.train.validation import Validator


@dataclass
class Progress:
    """What the loop has done so far."""

    position: Position
    losses: list[float] = field(default_factory=list)
    checkpoint: Path | None = None
    validation_files: list[Path] = field(default_factory=list)
    interrupted: bool = False


@dataclass
class Loop:
    """`go()` trains until `total` steps are done or `stop()` says so. `config` is what checkpoints record."""

    run: Run
    plugins: PluginSet
    engine: Engine
    kernel: Kernel
    loader: Loader
    validator: Validator | None
    writer: MetricsWriter
    console: Console
    stop: Callable[[], bool]
    config: Mapping[str, Any]
    total: int
    progress: Progress

    def __post_init__(self) -> None:
        self._clock = time.perf_counter()
        self._saved_step = self.progress.position.step
        self._notes_told = len(self.run.notes)

    @property
    def micros_per_step(self) -> int:
        """Micro-batches of one optimizer step over all processes."""
        return micros_per_step(self.run, self.engine)

    def go(self) -> None:
        """Train. Errors: `NonFiniteLossError`; whatever plugins raise."""
        first = self.progress.position.step + 1
        if self.validator is not None and self.run.config.validation_at_start and first == 1:
            self._look(0)
        pending: PendingResult | None = None
        with ExitStack() as stack:
            stream = self.loader.stream(self._my_micros(first))
            stack.callback(stream.close)
            display = stack.enter_context(live_display(self.console, self.total, first - 1, self.engine.device))
            for number in range(first, self.total + 1):
                result = self._one_step(number, stream)
                if pending is not None:
                    self._deliver(pending, display)
                pending = result
                save, look = self._due(number)
                if save or look or result.arrived is None:  # on a GPU the numbers may arrive behind the next step
                    self._deliver(pending, display)
                    pending = None
                if save:
                    self._save()
                if look and not self.progress.interrupted:
                    self._look(number)
                if self.progress.interrupted:
                    break
            if pending is not None:
                self._deliver(pending, display)
        if self.progress.interrupted and self._saved_step != self.progress.position.step:
            self._save()

    def _due(self, number: int) -> tuple[bool, bool]:
        """(save, validate) after step `number`."""
        config, last = self.run.config, number == self.total
        save = last or number % config.checkpoint_step_interval == 0
        look = self.validator is not None and (last or number % config.validation_step_interval == 0)
        return save, look

    def _my_micros(self, first: int) -> Iterator[int]:
        """This process's micro-batches, from optimizer step `first` to the last."""
        begin = self.progress.position.micro
        end = begin + (self.total - first + 1) * self.micros_per_step
        return iter(range(begin + self.engine.rank, end, self.engine.world))

    def _one_step(self, number: int, stream: Iterator[Batch]) -> PendingResult:
        per_step, engine = self.micros_per_step, self.engine
        base = self.progress.position.micro
        self.plugins.on_event(self.run, events.StepStarted(number))
        mine = range(base + engine.rank, base + per_step, engine.world)
        result = self.kernel.step(
            number,
            base // self.loader.micros_per_epoch,
            learning_rate(self.run.config, number, self.total),
            [(micro, next(stream)) for micro in mine],
            sum(self.loader.count(micro) for micro in range(base, base + per_step)),
            stop=self.stop(),
        )
        self.progress.position = Position(number, base + per_step, self.loader.fingerprint)
        return result

    def _deliver(self, pending: PendingResult, display: Display) -> None:
        """Wait for a step's numbers and tell everyone."""
        result = pending.wait()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.writer.write(result, seconds, self.kernel.offload.report() if self.kernel.offload else None)
        display.update(result, seconds)
        self._tell_notes()
        self.progress.losses.append(result.loss)
        self.plugins.on_event(self.run, events.StepFinished(result))
        alone = self.engine.world == 1  # several processes stop together: they agree through the step's numbers
        if pending.stop or (alone and self.stop()):
            self.progress.interrupted = True

    def _tell_notes(self) -> None:
        """Notes that came up while training (the start report has told the others)."""
        for note in self.run.notes[self._notes_told :]:
            self.console.print(f"[cyan]note[/] {note}", highlight=False, soft_wrap=True)
        self._notes_told = len(self.run.notes)

    def _save(self) -> None:
        self.writer.flush()
        position = self.progress.position
        if self.engine.is_main:
            checkpoint.save(self.run, self.kernel, position, self.config, self.plugins.lock())
        self.engine.wait()
        self._saved_step = position.step
        self.progress.checkpoint = checkpoint.folder_of(self.run.output_dir, position.step)
        self.plugins.on_event(self.run, events.CheckpointSaved(self.progress.checkpoint, position.step))
        self._clock = time.perf_counter()

    def _look(self, number: int) -> None:
        assert self.validator is not None
        files: list[Path] = []
        if self.engine.is_main:
            with self.console.status("validation") if self.console.is_terminal else nullcontext():
                files = self.validator.validate(self.kernel.denoiser, number)
            self.console.print(
                f"validation after step {number}: {len(files)} files in {files[0].parent}",
                highlight=False,
                soft_wrap=True,
            )
        self.progress.validation_files = files
        self.engine.wait()
        self.plugins.on_event(self.run, events.ValidationFinished(tuple(files), number))
        self._clock = time.perf_counter()


def micros_per_step(run: Run, engine: Engine) -> int:
    """Micro-batches of one optimizer step over all processes."""
    return run.config.gradient_accumulation_steps * engine.world
