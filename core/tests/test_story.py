"""Whole runs of the toy family: streams, interrupts, events, errors, dry runs, trackers."""

from __future__ import annotations

import io
import json
import os
import signal

import av
import hooktuner
import pytest
import torch
from hooktuner.errors import HooktunerError, NonFiniteLossError
from hooktuner.testing import ToyFamily, make_project
from rich.console import Console

QUIET = Console(quiet=True)


def adapter(result):
    return (result.checkpoint / "pytorch_lora_weights.safetensors").read_bytes()


def test_training_is_bit_equal_with_validation_on_or_off(tmp_path):
    keys = {"max_train_steps": 3, "lora_dropout": 0.2, "validation_num_inference_steps": 2}
    off = hooktuner.run(make_project(tmp_path / "off", **keys), plugins=[ToyFamily], console=QUIET)
    keys |= {"validation_disable": False, "validation_prompt": "a square", "validation_step_interval": 1}
    on = hooktuner.run(
        make_project(tmp_path / "on", validation_at_start=True, **keys), plugins=[ToyFamily], console=QUIET
    )
    assert adapter(on) == adapter(off)
    assert on.losses == off.losses
    steps = sorted(path.name for path in (tmp_path / "on/output/validation").iterdir())
    assert steps == ["step-000000", "step-000001", "step-000002", "step-000003"]
    with av.open(str(on.validation_files[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    assert off.validation_files == []


def test_prompt_libraries_are_sampled_under_safe_names(tmp_path):
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"anime_<token>": "one", "anime_*token*": "two", "plain": "three"}))
    path = make_project(
        tmp_path, max_train_steps=1, validation_disable=False, user_prompt_library=str(library),
        validation_num_inference_steps=1, validation_resolution="32x32,48x32",
    )  # fmt: skip
    result = hooktuner.run(path, plugins=[ToyFamily], console=QUIET)
    assert sorted(file.name for file in result.validation_files) == [
        "anime_token-2_32x32.mp4", "anime_token-2_48x32.mp4", "anime_token_32x32.mp4", "anime_token_48x32.mp4",
        "plain_32x32.mp4", "plain_48x32.mp4",
    ]  # fmt: skip


def test_a_first_frame_flavour_validates_from_training_clips(tmp_path):
    path = make_project(
        tmp_path, flavour="toy-i2v", max_train_steps=1, validation_disable=False, validation_prompt="a square",
        validation_num_inference_steps=1,
    )  # fmt: skip
    assert len(hooktuner.run(path, plugins=[ToyFamily], console=QUIET).validation_files) == 1


class Listener:
    """Records events, and may do something at one of them."""

    name = "listener"

    def __init__(self, at=None, do=None):
        self.at, self.do, self.seen = at, do, []

    @hooktuner.hookimpl
    def on_event(self, run, event):
        self.seen.append(type(event).__name__)
        if self.at and type(event).__name__ == self.at:
            self.do()


def test_events_come_in_the_order_of_a_run(tmp_path):
    listener = Listener()
    path = make_project(
        tmp_path, max_train_steps=2, checkpoint_step_interval=1, validation_disable=False, validation_prompt="x",
        validation_num_inference_steps=1, validation_step_interval=2,
    )  # fmt: skip
    hooktuner.run(path, plugins=[ToyFamily, listener], console=QUIET)
    step = ["StepStarted", "StepFinished", "CheckpointSaved"]
    assert listener.seen == [
        "RunStarted", "CachingFinished", "TrainingStarted", *step, *step, "ValidationFinished", "RunEnded",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    console = Console(record=True, width=300, file=io.StringIO())
    listener = Listener("StepStarted", lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    result = hooktuner.run(make_project(tmp_path, max_train_steps=5), plugins=[ToyFamily, listener], console=console)
    text = console.export_text()
    assert (result.reason, result.steps) == ("interrupted", 1)
    assert result.checkpoint.name == "step-000001"
    assert "Stopped after step 1 of 5; saved" in text
    assert "Run the same command again to go on" in text
    assert signal.getsignal(number) == before


def test_a_signal_while_caching_stops_and_the_next_run_goes_on(tmp_path):
    path = make_project(tmp_path, max_train_steps=1, clips=3)

    class Interrupts(ToyFamily):
        name = "toy"
        encoded = 0

        @hooktuner.hookimpl
        def encode_latents(self, run, vae, pixels_BCFHW):
            Interrupts.encoded += 1
            if Interrupts.encoded == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().encode_latents(run, vae, pixels_BCFHW)

    result = hooktuner.run(path, plugins=[Interrupts], console=QUIET)
    assert (result.reason, result.steps, result.checkpoint) == ("interrupted", 0, None)
    assert hooktuner.run(path, plugins=[Interrupts], console=QUIET).steps == 1
    assert Interrupts.encoded == 3  # what was encoded before the interrupt was not encoded again


def test_everything_is_closed_after_an_error_in_a_plugin_and_the_error_names_it(tmp_path):
    def fail():
        raise ZeroDivisionError("oops")

    listener = Listener("StepFinished", fail)
    with pytest.raises(ZeroDivisionError) as caught:
        hooktuner.run(make_project(tmp_path, max_train_steps=2), plugins=[ToyFamily, listener], console=QUIET)
    assert any("raised by plugin listener" in note and "in hook on_event" in note for note in caught.value.__notes__)
    assert listener.seen[-1] == "RunEnded"


def test_a_dry_run_plans_and_loads_nothing(tmp_path):
    class NeverLoads(ToyFamily):
        name = "toy"

        @hooktuner.hookimpl
        def load_model(self, run, part):
            raise AssertionError("loaded")

    path = make_project(tmp_path, max_train_steps=2)
    result = hooktuner.run(path, plugins=[NeverLoads], console=QUIET, dry_run=True)
    assert result.reason == "planned"
    assert not (tmp_path / "output/checkpoints").exists()
    assert (tmp_path / "output/data.json").is_file()


def test_a_mapping_does_what_the_file_does(tmp_path):
    path = make_project(tmp_path, max_train_steps=1)
    one = hooktuner.run(path, plugins=[ToyFamily], console=QUIET)
    config = json.loads(path.read_text()) | {"output_dir": str(tmp_path / "other")}
    other = hooktuner.run(config, plugins=[ToyFamily], console=QUIET)
    assert adapter(one) == adapter(other)


def test_epochs_alone_decide_the_length(tmp_path):
    path = make_project(tmp_path, clips=3, max_train_steps=None, num_train_epochs=2, train_batch_size=2)
    result = hooktuner.run(path, plugins=[ToyFamily], console=QUIET)
    assert result.steps == 4  # three clips in batches of two: two micro-batches an epoch


def test_bf16_trains_with_a_float32_adapter(tmp_path):
    result = hooktuner.run(
        make_project(tmp_path, max_train_steps=2, mixed_precision="bf16"), plugins=[ToyFamily], console=QUIET
    )
    from safetensors.torch import load_file

    assert all(
        value.dtype == torch.float32 for value in load_file(result.checkpoint / "state/trainables.safetensors").values()
    )
    assert all(loss == loss for loss in result.losses)


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    hooktuner.run(
        make_project(tmp_path, max_train_steps=2, report_to="tensorboard"), plugins=[ToyFamily], console=QUIET
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = next(path.parent for path in (tmp_path / "output/trackers").rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    losses = [event.value for event in accumulator.Scalars("loss/flow")]
    lines = [json.loads(line) for line in (tmp_path / "output/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([line["loss/flow"] for line in lines])


def test_a_nan_stops_the_run_with_exit_code_1_and_keeps_the_checkpoint(tmp_path):
    class Nan:
        name = "nan"

        @hooktuner.hookimpl
        def compute_loss(self, run, step):
            loss_B = step.prediction_BCFHW.square().flatten(1).mean(1)
            return loss_B * float("nan") if step.number == 2 else loss_B

    path = make_project(tmp_path, max_train_steps=3, checkpoint_step_interval=1)
    with pytest.raises(NonFiniteLossError, match="step 2") as caught:
        hooktuner.run(path, plugins=[ToyFamily, Nan], console=QUIET)
    assert isinstance(caught.value, HooktunerError)
    assert caught.value.exit_code == 1
    assert os.listdir(tmp_path / "output/checkpoints") == ["step-000001"]
    assert len((tmp_path / "output/metrics.jsonl").read_text().splitlines()) == 1
