"""The conformance checks that train: they pass for a decent technique and catch each kind of misbehaviour."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hooktuner import BlockCall, BlockInterceptor, PluginOptions, Regularizer, hookimpl
from hooktuner.events import RunStarted, ValidationFinished
from hooktuner.testing import PluginConformance, ToyFamily
from hooktuner.testing.toy_model import ToyBlock
from pydantic import Field


class PullOptions(PluginOptions):
    pull_weight: float = Field(0.1, ge=0, description="Weight of the pull towards zero velocity.")


class Pull(Regularizer):
    """A loss term that grows with every step, so its counter must be saved."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.seen = 0

    def terms(self, step: Any) -> Mapping[str, torch.Tensor]:
        self.seen += 1
        return {"": self.weight * self.seen * step.prediction_BCFHW.square().mean()}

    def state(self) -> Mapping[str, Any]:
        return {"seen": self.seen}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


class Puller:
    """A decent technique."""

    name = "puller"
    kind: type[Pull] = Pull

    @hookimpl
    def options(self) -> type[PluginOptions]:
        return PullOptions

    @hookimpl
    def regularizer(self, run: Any, model: Any) -> Regularizer:
        return self.kind(run.options_of("puller", PullOptions).pull_weight)


class Watcher:
    """A technique with neutral settings: it looks at blocks and changes nothing."""

    @hookimpl
    def intercept_blocks(self, run: Any, model: Any) -> BlockInterceptor:
        return BlockInterceptor()


def check(name: str, plugin: Any, tmp_path: Path, **attributes: Any) -> None:
    """Run one check on a plugin. A skipped check fails the test: it would have found nothing."""
    conformance = type("Mine", (PluginConformance,), {"plugin": plugin, "tiny_flavour": "toy", **attributes})()
    try:
        getattr(conformance, name)(tmp_path)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"{name} was skipped: {skipped}")


def refuses(name: str, plugin: Any, tmp_path: Path, *, match: str, **attributes: Any) -> None:
    """The check fails with a message that matches."""
    with pytest.raises(AssertionError, match=match):
        check(name, plugin, tmp_path, **attributes)


@pytest.mark.parametrize("name", ["test_resumed_runs_are_exact", "test_validation_is_clean"])
def test_a_decent_technique(name: str, tmp_path: Path) -> None:
    check(name, Puller, tmp_path, options={"pull_weight": 0.2})


def test_errors_of_a_technique_are_blamed() -> None:
    type("Mine", (PluginConformance,), {"plugin": Puller})().test_errors_are_blamed_on_the_plugin()


def test_a_technique_with_neutral_settings(tmp_path: Path) -> None:
    check("test_neutral_settings_change_nothing", Watcher, tmp_path, neutral={})


def test_a_technique_that_is_not_neutral(tmp_path: Path) -> None:
    class Nudge(BlockInterceptor):
        def call(self, call: BlockCall, proceed: Any) -> Any:
            return proceed(call) * (1 + 1e-6)

    class Nudger:
        @hookimpl
        def intercept_blocks(self, run: Any, model: Any) -> BlockInterceptor:
            return Nudge()

    match = "the plugin with neutral settings changes the loss of step 1"
    refuses("test_neutral_settings_change_nothing", Nudger, tmp_path, match=match, neutral={})


def test_state_that_is_not_saved(tmp_path: Path) -> None:
    class Amnesiac(Pull):
        def restore(self, state: Mapping[str, Any]) -> None: ...

    class Forgetful(Puller):
        kind = Amnesiac

    refuses("test_resumed_runs_are_exact", Forgetful, tmp_path, match="resuming changes the loss of step 3")


@pytest.fixture
def patched() -> Iterator[None]:
    """Undo what the leaky plugins of these tests do."""
    forward, dtype, environment = ToyBlock.forward, torch.get_default_dtype(), dict(os.environ)
    yield
    ToyBlock.forward = forward  # type: ignore[method-assign]
    torch.set_default_dtype(dtype)
    for name in set(os.environ) - set(environment):
        del os.environ[name]


def _on_start(action: Any) -> type:
    class Leaky:
        @hookimpl
        def on_event(self, run: Any, event: Any) -> None:
            if isinstance(event, RunStarted):
                action(run)

    return Leaky


def _patch_class(run: Any) -> None:
    forward = ToyBlock.forward
    ToyBlock.forward = lambda self, *args: forward(self, *args)  # type: ignore[method-assign,assignment]


def _count_runs(run: Any) -> None:
    os.environ["RUNS"] = str(int(os.environ.get("RUNS", "0")) + 1)


def _patch_in_failing_run(run: Any) -> None:
    """Leaves its patch only in the run that ends in an error."""
    if run.output_dir.parent.name == "third":
        _patch_class(run)


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(
    ("action", "match"),
    [(_count_runs, r"changed: os\.environ"), (_patch_in_failing_run, r"changed: .*ToyBlock\.forward")],
)
def test_a_technique_that_leaves_traces(action: Any, match: str, tmp_path: Path) -> None:
    refuses("test_runs_leave_no_trace", _on_start(action), tmp_path, match=match)


def test_a_technique_that_undoes_its_patch_is_fine(tmp_path: Path) -> None:
    def patch(run: Any) -> None:
        forward = ToyBlock.forward
        _patch_class(run)
        run.on_close(lambda: setattr(ToyBlock, "forward", forward))

    check("test_runs_leave_no_trace", _on_start(patch), tmp_path)


def test_validation_that_touches_training(tmp_path: Path) -> None:
    class Meddler(Puller):
        @hookimpl
        def regularizer(self, run: Any, model: Any) -> Regularizer:
            self.pull = super().regularizer(run, model)
            return self.pull

        @hookimpl
        def on_event(self, event: Any) -> None:
            if isinstance(event, ValidationFinished):
                self.pull.seen += 1  # type: ignore[attr-defined]

    refuses("test_validation_is_clean", Meddler, tmp_path, match="validation changes the loss of step 2")


def test_validation_that_writes_nothing(tmp_path: Path) -> None:
    class Deleter:
        @hookimpl
        def on_event(self, event: Any) -> None:
            if isinstance(event, ValidationFinished):
                for path in event.files:
                    path.unlink()

    refuses("test_validation_is_clean", Deleter, tmp_path, match="validation wrote no media")


def test_a_family_that_samples_from_the_global_stream_is_still_clean(tmp_path: Path) -> None:
    """Core keeps validation's random stream apart, whatever a family's pipeline does."""
    from hooktuner.testing.toy_parts import ToyPipeline

    class Careless(ToyPipeline):
        def sample(self, denoiser: Any, request: Any) -> Any:
            torch.manual_seed(0)
            return super().sample(denoiser, request)

    class Family(ToyFamily):
        @hookimpl
        def load_model(self, run: Any, part: Any) -> Any:
            loaded = super().load_model(run, part)
            if part == "pipeline":
                return Careless(loaded.codec, loaded.scheduler, wants_image=False)
            return loaded

    dropout = {"lora_dropout": 0.5}  # training that draws from the global stream
    check("test_validation_is_clean", Family, tmp_path, run_config=dropout)
