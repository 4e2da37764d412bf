"""The story of one run: it visits each room in order.

config → plugins → config → index → cache → loader → model, adapter, optimizer → kernel → metrics → checkpoints →
validation → close. `tuner run` does exactly what `hooktuner.run` does.
"""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hooktuner import events
from hooktuner.assemble import assemble, build_model_source, resolved
from hooktuner.context import Run
from hooktuner.draft import read_draft
from hooktuner.errors import CheckpointError, ConfigError
from hooktuner.files import remove_partials, write_json
from hooktuner.plugins import PluginSet

if TYPE_CHECKING:
    from torch import nn

    from hooktuner.data import DataPlan, Loader, TrainingData
    from hooktuner.train.kernel import Kernel
    from hooktuner.train.loop import Progress
    from hooktuner.train.validation import Validator


@dataclass
class RunResult:
    """What a run did. `reason` is `finished`, `interrupted` or `planned` (a dry run)."""

    output_dir: Path
    reason: str = "finished"
    steps: int = 0
    """Optimizer steps done in the whole run, resumed ones included."""
    losses: list[float] = field(default_factory=list)
    """The loss of every step of this call."""
    checkpoint: Path | None = None
    """The newest checkpoint: its folder holds the adapter or the full weights."""
    validation_files: list[Path] = field(default_factory=list)


def run(
    config: Path | str | Mapping[str, Any],
    plugins: Sequence[str | object] = (),
    flags: Sequence[str] = (),
    *,
    console: Console | None = None,
    dry_run: bool = False,
) -> RunResult:
    """Train as `config` says: a path of a JSON file, or a mapping of the same keys.

    plugins: names of installed plugins, or objects or classes with hooks, in the order that decides how they nest.
    flags: command-line flags (`["--max_train_steps", "10"]`) that override the config. console: where to report
    (default: standard error). dry_run: stop after the plan, before any model is loaded.
    Errors: `HooktunerError` and its children for everything that is the configuration's, the data's or the
    training's fault; everything that was opened is closed before it is raised.
    """
    console = console or Console(stderr=True)
    assembled = assemble(read_draft(config, flags=flags, plugins=plugins))
    return _Story(assembled.run, assembled.plugins, console).tell(dry_run=dry_run)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without the bars of diffusers and transformers for files that load in a moment; downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with warnings.catch_warnings():
        # diffusers' float normalisation of bfloat16 weights; said once per process by torch, and nothing to act on
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield from _without_bars(diffusers_logging, transformers_logging)


def _without_bars(*libraries: Any) -> Iterator[None]:
    loud = [one for one in libraries if one.is_progress_bar_enabled()]
    for one in loud:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in loud:
            one.enable_progress_bar()


class _Interrupt:
    """SIGINT and SIGTERM ask the run to stop after the step under way; a second one stops it at once."""

    def __init__(self, console: Console) -> None:
        self.asked = False
        self._console = console

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._console.print(
            f"[yellow]{signal.Signals(number).name}: finishing the step under way, then saving. "
            "Once more to stop at once, without saving.[/]"
        )


class _Story:
    """One run. Each method is a room."""

    def __init__(self, run: Run, plugins: PluginSet, console: Console) -> None:
        self.run = run
        self.config = run.config
        self.plugins = plugins
        self.console = console
        self.interrupt = _Interrupt(console)
        self.result = RunResult(run.output_dir)

    def tell(self, *, dry_run: bool) -> RunResult:
        reason = "failed"
        run = self.run
        run.on_close(self.plugins.close)
        run.on_close(lambda: self.plugins.on_event(run, events.RunEnded(reason, self.result.steps)))
        try:
            with self.interrupt.listening(), _quiet_libraries():
                self._train_or_plan(dry_run)
            reason = self.result.reason
        finally:
            run.close()
        return self.result

    def _train_or_plan(self, dry_run: bool) -> None:
        from hooktuner.data import PreparationStopped, build_caches, index_datasets
        from hooktuner.train.engine import Engine
        from hooktuner.train.precision import compute_dtype, weight_dtype

        run = self.run
        self.engine = engine = Engine(self.config)
        run.on_close(engine.close)
        run.device = engine.device
        run.weight_dtype, run.compute_dtype = weight_dtype(self.config), compute_dtype(self.config)
        if not engine.is_main:
            self.console.quiet = True
        self._open_folder()
        self.plugins.on_event(run, events.RunStarted())

        try:
            with engine.main_first():
                plan = index_datasets(run, console=self.console, stop=self.interrupt)
            self._check_machine(plan)
            if dry_run:
                self._report_notes()
                self.result.reason = "planned"
                return
            with engine.main_first():
                run.model_path = build_model_source(run)
                data = build_caches(
                    run, self.plugins, plan, self._prompt_texts(), console=self.console, stop=self.interrupt
                )
        except PreparationStopped as stopped:
            self.result.reason = "interrupted"
            self.console.print(f"{stopped} Run the same command again to go on.", highlight=False, soft_wrap=True)
            return
        self.plugins.on_event(run, events.CachingFinished())
        self._train(data)

    # --------------------------------------------------------------------------------------------- before training

    def _open_folder(self) -> None:
        if self.engine.is_main:
            folder = self.run.output_dir
            folder.mkdir(parents=True, exist_ok=True)
            remove_partials(folder)
        self.engine.wait()

    def _record(self, first_step: int) -> None:
        """Write down what runs, once it is sure that it will; checkpoints of another continuation make room."""
        from hooktuner.train import checkpoint as checkpoints

        if self.engine.is_main:
            folder = self.run.output_dir
            write_json(folder / checkpoints.CONFIG_FILE, resolved(self.run))
            write_json(folder / checkpoints.LOCK_FILE, self.plugins.lock())
            aside = checkpoints.set_aside(folder, first_step - 1)
            if aside is not None:
                self.console.print(
                    f"Checkpoints after step {first_step - 1} belong to another run: moved to {aside}.",
                    highlight=False,
                    soft_wrap=True,
                )
        self.engine.wait()

    def _check_machine(self, plan: DataPlan) -> None:
        """What the family cannot do with these clips on this device, before anything is loaded."""
        card = self.run.card
        assert card is not None
        clips = sorted({(clip.bucket.frames, clip.bucket.height, clip.bucket.width) for clip in plan.clips})
        problems = list(card.check(self.run)) if card.check else []
        problems += card.check_clips(self.run, clips) if card.check_clips else []
        if problems:
            raise ConfigError(problems)

    def _prompts(self) -> list[Any]:
        from hooktuner.train.validation import named_prompts

        if self.config.validation_disable:
            return []
        return named_prompts(self.config.prompts())

    def _prompt_texts(self) -> list[str]:
        prompts = self._prompts()
        return [*(prompt.text for prompt in prompts), self.config.validation_negative_prompt or ""] if prompts else []

    def _report_notes(self) -> None:
        for note in self.run.notes:
            self.console.print(f"[cyan]note[/] {note}", highlight=False, soft_wrap=True)

    # ---------------------------------------------------------------------------------------------------- training

    def _train(self, data: TrainingData) -> None:
        from hooktuner.train import checkpoint as checkpoints
        from hooktuner.train.loop import Loop, Progress
        from hooktuner.train.metrics import MetricsWriter
        from hooktuner.train.optim import horizon_note

        run, loader = self.run, data.loader()
        total = self._total_steps(loader)
        note = horizon_note(self.config, total)
        if note:
            run.note(note)
        source = checkpoints.find(run)
        if source is not None:
            self._check_resume(source)
        kernel = self._build_kernel(source)
        position = checkpoints.Position()
        if source is not None:
            position = checkpoints.restore(source, run, kernel)
            if position.data != loader.fingerprint:
                run.note(f"since {source.name}: the clips, captions or batches changed; the order of samples is new")
            self.result.checkpoint = source
            self.console.print(f"Resumed from {source} after step {position.step}.", highlight=False)
        self.result.steps = position.step
        validator = self._validator(data)
        self._report_plan(kernel, loader, total)
        if position.step >= total:
            self.console.print(f"Nothing to do: {position.step} of {total} steps are done. Raise max_train_steps.")
            return
        self._record(position.step + 1)
        writer = MetricsWriter(run.output_dir, self.engine, after_step=position.step)
        run.on_close(writer.close)
        self.engine.start_trackers(self.config)
        self.plugins.on_event(run, events.TrainingStarted(position.step + 1, total))
        progress = Progress(position, checkpoint=source)
        loop = Loop(
            run, self.plugins, self.engine, kernel, loader, validator, writer, self.console, self.interrupt,
            resolved(run), total, progress,
        )  # fmt: skip
        try:
            loop.go()
        finally:
            self._take_over(progress)
        if progress.interrupted:
            self.result.reason = "interrupted"
            self.console.print(
                f"Stopped after step {progress.position.step} of {total}; saved {progress.checkpoint}. "
                f"{self._how_to_go_on()}",
                highlight=False,
                soft_wrap=True,
            )

    def _how_to_go_on(self) -> str:
        if self.config.resume_from_checkpoint == "latest":
            return "Run the same command again to go on."
        return "Run it again with --resume_from_checkpoint latest to go on."

    def _take_over(self, progress: Progress) -> None:
        self.result.steps = progress.position.step
        self.result.losses = progress.losses
        self.result.checkpoint = progress.checkpoint
        self.result.validation_files = progress.validation_files

    def _total_steps(self, loader: Loader) -> int:
        from hooktuner.train.loop import micros_per_step

        if self.config.max_train_steps is not None:
            return self.config.max_train_steps
        assert self.config.num_train_epochs is not None
        return math.ceil(
            self.config.num_train_epochs * loader.micros_per_epoch / micros_per_step(self.run, self.engine)
        )

    def _check_resume(self, source: Path) -> None:
        from hooktuner.train import checkpoint as checkpoints

        refusals, notes = checkpoints.compare(source, resolved(self.run), self.plugins.lock())
        if refusals:
            raise CheckpointError(
                f"{source} — was made by another run: {'; '.join(refusals)}. Resuming would give a wrong result: use "
                'another output_dir, or "resume_from_checkpoint": "none".'
            )
        for difference in notes:
            self.run.note(f"since {source.name}: {difference}")

    def _build_kernel(self, source: Path | None) -> Kernel:
        import torch

        from hooktuner.family import Part
        from hooktuner.train.adapters import collect_trainables, prepare_trainables
        from hooktuner.train.blocks import BlockRunner, Recompute
        from hooktuner.train.kernel import Kernel
        from hooktuner.train.optim import make_optimizer

        run, plugins, config = self.run, self.plugins, self.config
        assert run.card is not None
        assert run.device is not None
        base = run.model_path
        if source is not None and config.model_type == "full":
            run.model_path = source  # its transformer/ has the layout of a checkpoint
        denoiser: nn.Module = plugins.load_model(run, Part.DENOISER)
        run.model_path = base
        if source is not None and config.model_type == "full":  # exports keep naming the model it came from
            denoiser.register_to_config(_name_or_path=str(base))  # type: ignore[operator]
        denoiser.train()
        prepare_trainables(run, denoiser)
        run.anatomy = run.card.anatomy(run) if run.card.anatomy else None
        strategy = plugins.offload_strategy(run, denoiser)
        if strategy is None:
            denoiser.to(run.device)
        else:
            strategy.place()
            run.on_close(strategy.close)
        interceptors = [interceptor for _, interceptor in plugins.intercept_blocks(run, denoiser)]
        regularizers = plugins.regularizer(run, denoiser)
        for regularizer in regularizers.values():
            for module in regularizer.modules().values():
                module.to(run.device)
        recompute = Recompute(
            enabled=config.gradient_checkpointing,
            interval=config.gradient_checkpointing_interval,
            dropout=config.lora_dropout > 0,
        )
        runner = BlockRunner(denoiser, run.anatomy, interceptors, recompute)
        runner.attach()
        run.on_close(runner.detach)
        trainables = collect_trainables(denoiser, regularizers)
        optimizer: torch.optim.Optimizer = make_optimizer(config, trainables)
        return Kernel(run, plugins, self.engine, denoiser, runner, regularizers, trainables, optimizer, strategy)

    def _validator(self, data: TrainingData) -> Validator | None:
        from hooktuner.train.validation import Validator

        prompts = self._prompts()
        if not prompts:
            return None
        wanted = self.config.eval_dataset_id if self.config.validation_using_datasets else None

        def first_frames(size: tuple[int, int]) -> list[Any]:
            return [image for image, _ in data.first_frames(wanted, len(prompts), size)]

        conditioned = "first_frame" in self.run.flavour.conditioning
        return Validator(self.run, self.plugins, prompts, data.text, first_frames if conditioned else None)

    def _report_plan(self, kernel: Kernel, loader: Loader, total: int) -> None:
        from hooktuner.train.adapters import parameter_bytes
        from hooktuner.train.loop import micros_per_step
        from hooktuner.train.metrics import in_bytes

        run, config = self.run, self.config
        assert run.card is not None
        weights = parameter_bytes(kernel.denoiser.parameters())
        trained = list(kernel.trainables.named().values())
        step_samples = config.train_batch_size * micros_per_step(run, self.engine)
        lines = [
            f"[bold]{run.card.name}[/] {run.flavour.name} ({config.model_type}) on {run.device}, "
            f"arithmetic {str(run.compute_dtype).removeprefix('torch.')}",
            f"denoiser weights {in_bytes(weights)}; gradients and optimizer {in_bytes(3 * parameter_bytes(trained))}",
            *(f"trained, {line}" for line in kernel.trainables.describe()),
            f"{loader.samples_per_epoch} samples per epoch, up to {step_samples} per step, {total} steps "
            f"({total * micros_per_step(run, self.engine) / loader.micros_per_epoch:.1f} epochs)",
        ]
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)
        self._report_notes()
