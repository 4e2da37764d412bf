"""Helpers for the tests of this plugin; they need core and this plugin only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hooktuner import hookimpl
from hooktuner.context import Run
from hooktuner.plugins import PluginSet
from hooktuner.step import Step
from hooktuner.testing import ToyFamily, load_denoiser, make_batch, make_plugins, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.optim import make_optimizer

sys.path.insert(0, str(Path(__file__).parent))  # `fields`

KEY = "scheduled_sampling_"
CAPTIONS = tuple(f"caption {'word ' * number}" for number in range(6))


class Counting(ToyFamily):
    """The toy family, remembering every call of `predict`."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    @hookimpl
    def predict(self, run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor:
        """What the toy family predicts."""
        self.calls.append(
            {
                "sigma": step.sigma_B.clone(),
                "timestep": step.timestep_B.clone(),
                "noisy": step.noisy_BCFHW.clone(),
                "gradients": torch.is_grad_enabled(),
                "training": denoiser.training,
            }
        )
        return super().predict(run, denoiser, step)


class Kit:
    """A kernel with the toy family, and what a test looks at."""

    def __init__(self, folder: Path, *, flavour: str | None = None, plugin: bool = True, **config: Any) -> None:
        self.family = Counting()
        techniques = ["scheduled-sampling"] if plugin else []
        self.plugins: PluginSet = make_plugins(self.family, *techniques)
        self.run = make_run(self.plugins, flavour, folder, **{"max_train_steps": 100, **config})
        denoiser = load_denoiser(self.run, self.plugins)
        prepare_trainables(self.run, denoiser)
        with torch.no_grad():  # an adapter that does something
            for index, (name, value) in enumerate(denoiser.named_parameters()):
                if "lora_B" in name:
                    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(index)) * 0.05)
        regularizers = self.plugins.regularizer(self.run, denoiser)
        trainables = collect_trainables(denoiser, regularizers)
        runner = BlockRunner(denoiser, self.run.anatomy, [], Recompute(enabled=False))
        runner.attach()
        engine = Engine(self.run.config)
        optimizer = make_optimizer(self.run.config, trainables)
        self.kernel = Kernel(self.run, self.plugins, engine, denoiser, runner, regularizers, trainables, optimizer)

    def batch(self, count: int = 6, first: int = 0, sigma: Any = None) -> Any:
        """A batch of `count` samples."""
        return make_batch(self.run, self.plugins, captions=CAPTIONS[:count], first_index=first, sigma=sigma)

    def draw(self, batch: Any, number: int = 1) -> Step:
        """The step after `prepare_input`; `calls` then holds the rollout's forward passes only."""
        self.family.calls.clear()
        return self.kernel.draw(batch, number, 0)

    def gradients(self, batch: Any, number: int = 1) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Loss terms and gradients of a micro-batch."""
        self.kernel.optimizer.zero_grad(set_to_none=True)
        step = self.draw(batch, number)
        step.prediction_BCFHW = self.kernel.predict(step)
        terms = self.kernel.losses(step)
        torch.stack(list(terms.values())).sum().backward()
        named = self.kernel.trainables.named()
        found = {name: value.grad.clone() for name, value in named.items() if value.grad is not None}
        return {name: value.item() for name, value in terms.items()}, found


@pytest.fixture
def kit(tmp_path: Path) -> Callable[..., Kit]:
    """`kit(max_step_offset=20, probability=1, …)`: keys without their prefix; `config={…}` for keys of core."""

    def make(*, flavour: str | None = None, config: dict[str, Any] | None = None, **keys: Any) -> Kit:
        prefixed = {KEY + name: value for name, value in keys.items()}
        return Kit(tmp_path, flavour=flavour, plugin=bool(keys), **prefixed, **(config or {}))

    return make
