"""Tiny checkpoints and runs for the tests of this plugin; needs core and this plugin only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hooktuner import flow
from hooktuner.config import RunConfig
from hooktuner.context import Run
from hooktuner.family import Part
from hooktuner.step import Batch, Step
from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.card import CARD
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions
from hooktuner_kandinsky5_video.plugin import Kandinsky5Video

CAPTIONS = ("a dog", "a very long tale of two cats & a dog that   cross the bridge at dusk")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the tiny flavours."""
    root = tmp_path_factory.mktemp("kandinsky5")
    paths = {}
    for name, flavour in CARD.flavours.items():
        if flavour.build is not None:
            paths[name] = root / name
            flavour.build(paths[name])
    return paths


@pytest.fixture(scope="session")
def make_run(checkpoints: dict[str, Path]) -> Callable[..., Run]:
    """`make_run(flavour, config={…}, **options)`: a float32 run on the CPU."""

    def make(flavour: str = "tiny", config: dict[str, Any] | None = None, **options: Any) -> Run:
        defaults = CARD.defaults_of(flavour)
        return Run(
            config=RunConfig(**{**defaults, "model_family": NAME, "model_flavour": flavour, **(config or {})}),
            card=CARD,
            model_path=checkpoints.get(flavour),
            device=torch.device("cpu"),
            weight_dtype=torch.float32,
            compute_dtype=torch.float32,
            options={NAME: Kandinsky5VideoOptions(**options)},
        )

    return make


@pytest.fixture(scope="session")
def plugin() -> Kandinsky5Video:
    return Kandinsky5Video()


@pytest.fixture(scope="session")
def captions_encoded(make_run: Callable[..., Run], plugin: Kandinsky5Video) -> dict[str, dict[str, torch.Tensor]]:
    """Encoded captions, the empty and the negative one included."""
    run = make_run()
    encoder = plugin.load_model(run, Part.TEXT_ENCODER)
    texts = [*CAPTIONS, "a cat", "", CARD.defaults["validation_negative_prompt"]]
    return dict(zip(texts, map(dict, plugin.encode_text(run, encoder, texts)), strict=True))


@pytest.fixture
def make_step(captions_encoded: dict[str, dict[str, torch.Tensor]], plugin: Kandinsky5Video) -> Callable[..., Step]:
    """`make_step(run, captions, shape=(F, H, W))`: the step of a random batch, conditioned by the plugin."""

    def make(
        run: Run,
        captions: Sequence[str] = CAPTIONS,
        shape: tuple[int, int, int] = (3, 8, 12),
        index: Sequence[int] | None = None,
        extras: dict[str, torch.Tensor] | None = None,
    ) -> Step:
        generator = torch.Generator().manual_seed(7)
        batch_size = len(captions)
        latents = torch.randn(batch_size, 16, *shape, generator=generator)
        noise = torch.randn(batch_size, 16, *shape, generator=generator)
        sigma = torch.linspace(0.3, 0.9, batch_size)
        if extras is None and "first_frame" in run.flavour.conditioning:
            extras = {"first_latent": torch.randn(batch_size, 16, 1, *shape[1:], generator=generator)}
        batch = Batch(
            keys=[f"clip{number}" for number in range(batch_size)],
            index=list(index) if index is not None else list(range(batch_size)),
            latents_BCFHW=latents,
            noise_BCFHW=noise,
            sigma_B=sigma,
            text=[captions_encoded[caption] for caption in captions],
            extras=extras or {},
            pixels=(4 * (shape[0] - 1) + 1, shape[1] * 8, shape[2] * 8),
        )
        step = Step(
            number=1,
            micro=0,
            batch=batch,
            sigma_B=sigma,
            timestep_B=flow.timestep(sigma),
            noisy_BCFHW=flow.interpolate(latents, noise, sigma),
            target_BCFHW=flow.velocity(latents, noise),
        )
        step.conditioning = plugin.condition(run, step)
        if step.conditioning is not None:  # as core does
            given, values = step.conditioning.given_B1FHW, step.conditioning.latents_BCFHW
            step.noisy_BCFHW = torch.where(given, values, step.noisy_BCFHW)
        return step

    return make
