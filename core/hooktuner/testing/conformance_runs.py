"""The part of `PluginConformance` that trains: whole runs of two or four steps on clips made on the spot.

Every comparison is bit for bit: losses of each step, and every tensor file of the last checkpoint.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from torch.nn import functional

import hooktuner
from hooktuner.discovery import Plugin
from hooktuner.family import Part
from hooktuner.testing.project import make_project
from hooktuner.testing.runs import as_plugin, make_plugins, make_run, plan_run, smallest_clip


@dataclass
class Outcome:
    """What a run left: the losses of its steps, and the bytes of every tensor file of its last checkpoint."""

    losses: list[float]
    tensors: Mapping[str, bytes]
    validation_files: list[Path] = field(default_factory=list)

    def assert_equal(self, other: Outcome, what: str) -> None:
        """Fail naming the first step or file that differs."""
        steps = zip(self.losses, other.losses, strict=True)
        differing = [number for number, (one, two) in enumerate(steps, 1) if one != two]
        assert not differing, f"{what} changes the loss of step {differing[0]}"
        assert self.tensors.keys() == other.tensors.keys(), f"{what} changes which files a checkpoint has"
        changed = [name for name, content in self.tensors.items() if other.tensors[name] != content]
        assert not changed, f"{what} changes {', '.join(changed)} of the checkpoint"


class RunChecks:
    """Checks that need whole runs. A technique is run on `family`, with `options`."""

    neutral: ClassVar[Mapping[str, Any] | None] = None
    """For techniques: config keys with which the plugin is active and must change nothing; None: it has no such
    setting."""
    run_config: ClassVar[Mapping[str, Any]] = {}
    """Further config keys for all runs."""

    def _plugin(self) -> Plugin:
        raise NotImplementedError

    def _family(self) -> Any:
        raise NotImplementedError

    def _family_flavour(self) -> str | None:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _hooktuner_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checkpoints that a flavour builds go to the test's own folder."""
        monkeypatch.setenv("HOOKTUNER_HOME", str(tmp_path / "home"))

    def test_neutral_settings_change_nothing(self, tmp_path: Path) -> None:
        """With its `neutral` settings the technique changes no bit of a run without it."""
        if self._plugin().is_family:
            pytest.skip("the plugin is a model family")
        if self.neutral is None:
            pytest.skip("the plugin declares no neutral settings")
        without = self._train(tmp_path / "without", active=False)
        self._train(tmp_path / "with", config=self.neutral).assert_equal(without, "the plugin with neutral settings")

    def test_resumed_runs_are_exact(self, tmp_path: Path) -> None:
        """A run of four steps, and one of two steps that is resumed for two more, end with the same bits."""
        whole = self._train(tmp_path / "whole", config=self._own(), steps=4)
        first = self._train(tmp_path / "parts", config=self._own(), steps=2)
        second = self._train(tmp_path / "parts", config=self._own(), steps=4)
        assert len(second.losses) == 2, f"the second run did {len(second.losses)} steps instead of going on for 2"
        Outcome(first.losses + second.losses, second.tensors).assert_equal(whole, "resuming")

    def test_runs_leave_no_trace(self, tmp_path: Path) -> None:
        """A run leaves the process as it was, nothing patched, no setting changed, also when it ends in an error."""
        self._train(tmp_path / "first", config=self._own())  # imports and caches of the first run are no trace
        before = self._state_of_process(tmp_path)
        self._train(tmp_path / "second", config=self._own())
        with pytest.raises(_Stop):
            self._train(tmp_path / "third", config=self._own(), further=[_Stopper()])
        after = self._state_of_process(tmp_path)
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, f"after a run these are changed: {', '.join(changed)}"

    def test_validation_is_clean(self, tmp_path: Path) -> None:
        """Validation after every step writes media and changes no bit of the training."""
        frames, height, width = self._clip(tmp_path)
        validation = {
            "validation_disable": False,
            "validation_prompt": "a dog",
            "validation_step_interval": 1,
            "validation_num_inference_steps": 2,
            "validation_resolution": f"{width}x{height}",
            "validation_num_video_frames": frames,
        }
        off = self._train(tmp_path / "off", config=self._own())
        on = self._train(tmp_path / "on", config={**self._own(), **validation})
        on.assert_equal(off, "validation")
        assert on.validation_files, "validation wrote no media"
        assert all(path.stat().st_size > 0 for path in on.validation_files), "validation wrote an empty file"

    # --------------------------------------------------------------------------------------------------- helpers

    def _own(self) -> Mapping[str, Any]:
        return getattr(self, "options", {})

    def _clip(self, folder: Path) -> tuple[int, int, int]:
        """(frames, height, width) of the clips. Skips families that are not trained on video."""
        with closing(make_plugins(self._family())) as plugins:
            run = plan_run(plugins, self._family_flavour(), folder)
        assert run.card is not None
        if run.card.media != "video":
            pytest.skip("these checks train on video clips, and the family is for images")
        return smallest_clip(run.card, run.flavour.name)

    def _train(
        self,
        folder: Path,
        *,
        active: bool = True,
        config: Mapping[str, Any] | None = None,
        steps: int = 2,
        further: list[Any] | None = None,
    ) -> Outcome:
        """Train a fresh project in `folder`, or go on with the one that is there."""
        frames, height, width = self._clip(folder)
        family, plugin = self._family(), self._plugin()
        path = make_project(
            folder,
            family=as_plugin(family).name,
            flavour=self._family_flavour(),
            frames=frames,
            size=(width, height),
            **{"max_train_steps": steps, **self.run_config, **(config or {})},
        )
        wanted = [family, *(further or [])]
        if active and not plugin.is_family:
            wanted.insert(1, self.plugin)  # type: ignore[attr-defined]
        result = hooktuner.run(path, plugins=wanted, console=Console(file=io.StringIO()))
        assert result.checkpoint is not None, "the run left no checkpoint"
        files = sorted(result.checkpoint.rglob("*.safetensors"))
        tensors = {str(file.relative_to(result.checkpoint)): file.read_bytes() for file in files}
        media = [path for path in (result.output_dir / "validation").rglob("*") if path.is_file()]
        return Outcome(list(result.losses), tensors, media)

    def _state_of_process(self, folder: Path) -> dict[str, Any]:
        """What a careless plugin might leave changed. Classes are those of the denoiser and their bases."""
        with closing(make_plugins(self._family())) as plugins:
            run = make_run(plugins, self._family_flavour(), folder / "model")
            denoiser = plugins.load_model(run, Part.DENOISER)
        kinds = {base for module in denoiser.modules() for base in type(module).__mro__ if base is not object}
        functions = {
            f"{kind.__module__}.{kind.__qualname__}.{name}": value
            for kind in kinds
            for name, value in vars(kind).items()
            if callable(value) and not name.startswith("__")
        }
        return {
            **functions,
            **{f"torch.nn.functional.{name}": value for name, value in vars(functional).items() if callable(value)},
            "os.environ": dict(os.environ),
            "threads": {thread.name for thread in threading.enumerate() if not thread.daemon},
            "the working directory": Path.cwd(),
            "signal handlers": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
            "torch.get_default_dtype()": torch.get_default_dtype(),
            "torch.get_num_threads()": torch.get_num_threads(),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "torch.is_autocast_enabled()": torch.is_autocast_enabled("cpu"),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        }


class _Stop(Exception):
    """What ends a run in the middle."""


class _Stopper:
    """A plugin that raises after the first step."""

    @hooktuner.hookimpl
    def on_event(self, event: Any) -> None:
        """Raise when a step is finished."""
        from hooktuner.events import StepFinished

        if isinstance(event, StepFinished):
            raise _Stop
