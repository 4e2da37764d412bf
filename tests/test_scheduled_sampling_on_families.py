"""Rollouts through the real denoisers of the families with small random weights: text and image to video."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import hooktuner
import pytest
import torch
from hooktuner.step import Batch, Step
from hooktuner.testing import load_denoiser, make_batch, make_plugins, make_project, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.optim import make_optimizer
from rich.console import Console

FAMILY, TECHNIQUE = "kandinsky5-video", "scheduled-sampling"
CAPTIONS = ("a dog", "a much longer tale of two cats that cross the bridge at dusk", "a cat")
"""Of unequal length, so that the family calls its denoiser more than once for a micro-batch."""
FLAVOURS = ("tiny", "tiny-i2v")
ON = {
    "scheduled_sampling_max_step_offset": 100,
    "scheduled_sampling_inference_steps": 20,
    "scheduled_sampling_probability": 1,
}


class Bench:
    """The kernel of a family's tiny denoiser with the plugin."""

    def __init__(self, folder: Path, flavour: str, **config: Any) -> None:
        self.plugins = make_plugins(FAMILY, TECHNIQUE)
        self.run = make_run(self.plugins, flavour, folder, **config)
        self.denoiser = load_denoiser(self.run, self.plugins)
        self.forwards = 0
        self.denoiser.register_forward_hook(self._count)
        prepare_trainables(self.run, self.denoiser)
        regularizers = self.plugins.regularizer(self.run, self.denoiser)
        trainables = collect_trainables(self.denoiser, regularizers)
        runner = BlockRunner(self.denoiser, self.run.anatomy, [], Recompute())
        runner.attach()
        engine, optimizer = Engine(self.run.config), make_optimizer(self.run.config, trainables)
        self.kernel = Kernel(self.run, self.plugins, engine, self.denoiser, runner, regularizers, trainables, optimizer)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def draw(self, batch: Batch) -> Step:
        """The step after `prepare_input`, and `forwards` of it."""
        self.forwards = 0
        return self.kernel.draw(batch, 1, 0)


def only(batch: Batch, row: int) -> Batch:
    """One sample of a batch, alone."""
    rows = slice(row, row + 1)
    return replace(
        batch,
        keys=batch.keys[rows],
        index=batch.index[rows],
        latents_BCFHW=batch.latents_BCFHW[rows],
        noise_BCFHW=batch.noise_BCFHW[rows],
        sigma_B=batch.sigma_B[rows],
        text=batch.text[rows],
        extras={name: value[rows] for name, value in batch.extras.items()},
    )


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rollouts_go_through_every_call_of_the_denoiser_and_samples_stay_apart(tmp_path, flavour):
    bench = Bench(tmp_path, flavour, **ON)
    batch = make_batch(bench.run, bench.plugins, captions=CAPTIONS)
    lengths = {sample["qwen_LD"].shape[0] for sample in batch.text}
    assert len(lengths) > 1
    before = torch.get_rng_state()
    step = bench.draw(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert bench.forwards == 2 * len(lengths)
    assert step.rows is None
    for row in range(len(CAPTIONS)):
        alone = bench.draw(only(batch, row))
        torch.testing.assert_close(alone.noisy_BCFHW[0], step.noisy_BCFHW[row], rtol=1e-3, atol=1e-4)
    sigma = batch.sigma_B.view(-1, 1, 1, 1, 1)
    moved = step.noisy_BCFHW - ((1 - sigma) * batch.latents_BCFHW + sigma * batch.noise_BCFHW)
    assert (moved[:, :, 1:].flatten(1).abs().amax(dim=1) > 1e-3).all()


def test_the_first_frame_of_image_to_video_stays_clean(tmp_path):
    bench = Bench(tmp_path, "tiny-i2v", **ON, scheduled_sampling_reflexflow=True)
    batch = make_batch(bench.run, bench.plugins, captions=CAPTIONS)
    step = bench.draw(batch)
    assert step.conditioning is not None
    assert torch.equal(step.noisy_BCFHW[:, :, 0], batch.extras["first_latent"][:, :, 0])
    step.prediction_BCFHW = bench.kernel.predict(step)
    terms = bench.kernel.losses(step)
    changed = replace(step, prediction_BCFHW=step.prediction_BCFHW.clone())
    assert changed.prediction_BCFHW is not None
    changed.prediction_BCFHW[:, :, 0] += 7
    for name, value in bench.kernel.losses(changed).items():
        torch.testing.assert_close(value, terms[name])


def train(folder: Path, flavour: str, **config: Any) -> tuple[list[float], dict[str, bytes]]:
    path = make_project(
        folder, family=FAMILY, flavour=flavour, size=(64, 64), **{"train_batch_size": 2, "lora_dropout": 0.1, **config}
    )
    result = hooktuner.run(path, console=Console(file=io.StringIO()))
    assert result.checkpoint is not None
    files = sorted(result.checkpoint.rglob("*.safetensors"))
    return list(result.losses), {str(file.relative_to(result.checkpoint)): file.read_bytes() for file in files}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_run_is_plain_at_probability_zero_and_trains_on_rollouts_otherwise(tmp_path, flavour, monkeypatch):
    monkeypatch.setenv("HOOKTUNER_HOME", str(tmp_path / "home"))
    plain = train(tmp_path / "plain", flavour)
    assert train(tmp_path / "zero", flavour, scheduled_sampling_max_step_offset=100) == plain
    losses, files = train(tmp_path / "on", flavour, **ON, scheduled_sampling_reflexflow=True)
    assert all(loss > other for loss, other in zip(losses, plain[0], strict=True))  # 10 times the drift is on top
    assert files.keys() == plain[1].keys()
    assert files != plain[1]
