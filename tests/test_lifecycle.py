"""The order of every hook call in a whole run of two steps, pinned; and that an idle plugin changes nothing."""

from __future__ import annotations

import hooktuner
from hooktuner.plugins import SPECS
from hooktuner.technique import BlockInterceptor, OffloadStrategy, Regularizer
from hooktuner.testing import ToyFamily, make_project
from rich.console import Console

QUIET = Console(quiet=True)

LOG: list[str] = []


class Family(ToyFamily):
    """The toy, noting what is asked of it."""

    name = "toy"

    @hooktuner.hookimpl
    def load_model(self, run, part):
        LOG.append(f"load_model {part}")
        return super().load_model(run, part)

    @hooktuner.hookimpl
    def encode_text(self, run, encoder, captions):
        LOG.append("encode_text")
        return super().encode_text(run, encoder, captions)

    @hooktuner.hookimpl
    def encode_latents(self, run, vae, pixels_BCFHW):
        LOG.append("encode_latents")
        return super().encode_latents(run, vae, pixels_BCFHW)

    @hooktuner.hookimpl
    def condition(self, run, step):
        LOG.append("condition")
        return super().condition(run, step)

    @hooktuner.hookimpl
    def predict(self, run, denoiser, step):
        LOG.append("predict")
        return super().predict(run, denoiser, step)


class Technique:
    """Answers every hook of a technique, and does nothing."""

    name = "technique"

    @hooktuner.hookimpl
    def encode_features(self, run, clip):
        LOG.append("encode_features")
        import torch

        return {"brightness": torch.tensor(float(clip.frames_FHWC.mean()))}

    @hooktuner.hookimpl
    def offload_strategy(self, run, model):
        LOG.append("offload_strategy")

        class Stay(OffloadStrategy):
            def place(self):
                LOG.append("place")
                model.to(run.device)

            def close(self):
                LOG.append("strategy closed")

        return Stay()

    @hooktuner.hookimpl
    def intercept_blocks(self, run, model):
        LOG.append("intercept_blocks")

        class Watch(BlockInterceptor):
            def begin(self, step):
                LOG.append("begin")

            def end(self, step):
                LOG.append("end")

        return Watch()

    @hooktuner.hookimpl
    def regularizer(self, run, model):
        LOG.append("regularizer")

        class Nothing(Regularizer):
            def terms(self, step):
                LOG.append("terms")
                assert step.batch.features["technique/brightness"].shape == (len(step.batch.index),)
                return {}

        return Nothing()

    @hooktuner.hookimpl
    def prepare_input(self, run, step, predict):
        LOG.append("prepare_input")

    @hooktuner.hookimpl
    def compute_loss(self, run, step):
        LOG.append("compute_loss")
        return (step.prediction_BCFHW - step.target_BCFHW).square().flatten(1).mean(1)

    @hooktuner.hookimpl
    def on_event(self, run, event):
        LOG.append(type(event).__name__)


STEP = ["StepStarted", "condition", "prepare_input", "begin", "predict", "compute_loss", "terms", "end", "StepFinished"]


PINNED = [
    "RunStarted",
    "load_model text_encoder", "encode_text",
    "load_model vae", "encode_latents",
    "encode_features",
    "CachingFinished",
    "load_model denoiser",
    "offload_strategy", "place", "intercept_blocks", "regularizer",
    "TrainingStarted",
    *STEP, *STEP,
    "CheckpointSaved",
    "load_model pipeline", "ValidationFinished",
    "strategy closed",
    "RunEnded",
]  # fmt: skip
"""Every hook call and event of a run of two steps on one clip, with one validation."""


def test_the_order_of_a_whole_run_of_two_steps(tmp_path):
    LOG.clear()
    path = make_project(
        tmp_path, clips=1, max_train_steps=2, validation_disable=False, validation_prompt="x",
        validation_num_inference_steps=1,
    )  # fmt: skip
    hooktuner.run(path, plugins=[Family, Technique], console=QUIET)
    assert LOG == PINNED


def test_every_hook_but_those_before_a_run_is_in_the_pinned_order():
    before = {"options", "describe_model", "commands"}
    called = {entry.split()[0] for entry in PINNED}
    assert set(SPECS) - before - {"on_event"} <= called


def test_plugins_that_do_nothing_change_no_bit(tmp_path):
    results = []
    for name, plugins in (("alone", [ToyFamily]), ("with", [ToyFamily, Technique])):
        path = make_project(tmp_path / name, max_train_steps=3)
        results.append(hooktuner.run(path, plugins=plugins, console=QUIET))
    one, other = ((result.checkpoint / "pytorch_lora_weights.safetensors").read_bytes() for result in results)
    assert one == other
    assert results[0].losses == results[1].losses
