"""The toy family with CREPA, kernel and all; and a reference of the loss in float64 numpy, written from the paper's sum
and not from the plugin's matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooktuner.context import Run
from hooktuner.plugins import PluginSet
from hooktuner.step import Batch
from hooktuner.technique import BlockInterceptor
from hooktuner.testing import ToyFamily, load_denoiser, make_batch, make_plugins, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel, PendingResult
from hooktuner.train.optim import make_optimizer
from hooktuner_crepa.plugin import Crepa

SMALL = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": "tiny", "crepa_encoder_image_size": 42}
CLIP = (9, 32, 64)
"""Frames, height, width in pixels: three latent frames of 2 x 4 tokens."""


class Taps(BlockInterceptor):
    """Keeps what every main block answers, with gradients, beside CREPA's own observer."""

    stage = "observe"

    def __init__(self) -> None:
        self.outputs: dict[int, list[torch.Tensor]] = {}
        self.kept: dict[int, list[Any]] = {}

    def call(self, call, proceed):
        output = proceed(call)
        output.retain_grad()
        self.outputs.setdefault(call.index, []).append(output)
        self.kept.setdefault(call.index, []).append(call.kept_BK)
        return output


@dataclass
class Bench:
    """A kernel with CREPA on the toy model, and the plugin objects in it."""

    run: Run
    plugins: PluginSet
    crepa: Crepa
    kernel: Kernel
    taps: Taps

    def batch(self, captions=("a red square", "a green circle"), first_index=0) -> Batch:
        return make_batch(self.run, self.plugins, captions=captions, pixels=CLIP, first_index=first_index)

    def step(self, *batches: Batch, number: int = 1) -> PendingResult:
        total = sum(len(batch.index) for batch in batches)
        return self.kernel.step(number, 0, 1e-3, list(enumerate(batches)), total)

    def backward(self, batch: Batch, number: int = 1):
        """Forward and backward without the optimizer: the step, its notes and its terms."""
        self.taps.outputs.clear()
        self.taps.kept.clear()
        step = self.kernel.draw(batch, number, 0)
        with self.kernel.runner.during(step):
            step.prediction_BCFHW = self.kernel.predict(step)
            terms = self.kernel.losses(step)
            notes = step.notes.get("crepa")
            sum(terms.values()).backward()
        return step, notes, terms

    def gradients(self) -> dict[str, torch.Tensor]:
        named = self.kernel.trainables.named()
        return {name: value.grad.clone() for name, value in named.items() if value.grad is not None}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """`bench(*interceptors, flavour=…, model=…, family=…, crepa=True, **config)`."""

    def make(*interceptors, flavour=None, family=ToyFamily, crepa=True, **config) -> Bench:
        plugin = Crepa()
        plugins = make_plugins(family, *([plugin] if crepa else []))
        config = {"max_train_steps": 10, "lora_rank": 4, **(SMALL if crepa else {}), **config}
        run = make_run(plugins, flavour, tmp_path, **config)
        denoiser = load_denoiser(run, plugins)
        prepare_trainables(run, denoiser)
        regularizers = plugins.regularizer(run, denoiser)
        trainables = collect_trainables(denoiser, regularizers)
        taps = Taps()
        mine = [one for _, one in plugins.intercept_blocks(run, denoiser)]
        runner = BlockRunner(
            denoiser, run.anatomy, [*interceptors, *mine, taps], Recompute(enabled=run.config.gradient_checkpointing)
        )
        runner.attach()
        kernel = Kernel(
            run, plugins, Engine(run.config), denoiser, runner, regularizers, trainables,
            make_optimizer(run.config, trainables),
        )  # fmt: skip
        return Bench(run, plugins, plugin, kernel, taps)

    return make


# ------------------------------------------------------------------------------------------------- the reference


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def resample_axis(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Triangle filter as wide as the larger of the two pixels, along one axis."""
    old = x.shape[axis]
    scale = old / size
    width = max(scale, 1.0)
    matrix = np.zeros((size, old))
    for i in range(size):
        for j in range(old):
            matrix[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * scale) / width)
        matrix[i] /= matrix[i].sum()
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)


def reference(
    student: Any,
    features: Any,
    grid: tuple[int, int, int],
    *,
    kept: Any = None,
    counted: Any = None,
    d: int = 1,
    tau: float = 1.0,
    cumulative: bool = False,
    normalize_sum: bool = False,
    mean_over_frames: bool = True,
    spatial: bool = True,
) -> np.ndarray:
    """A per sample (B,), by loops. student (B, K, E); features (B, F, gh, gw, E); kept (B, K) raster indices."""
    student, features = np.asarray(student, np.float64), np.asarray(features, np.float64)
    frames, rows, columns = grid
    values = []
    for b in range(len(student)):
        teacher = unit(resample_axis(resample_axis(features[b], rows, 1), columns, 2)).reshape(
            frames, -1, features.shape[-1]
        )
        indices = range(frames * rows * columns) if kept is None else [int(k) for k in kept[b]]
        tokens: dict[int, list[tuple[int, np.ndarray]]] = {}
        for n, index in enumerate(indices):
            tokens.setdefault(index // (rows * columns), []).append((index % (rows * columns), student[b, n]))
        per_frame = []
        for f, members in sorted(tokens.items()):
            if counted is not None and not counted[b][f]:
                continue
            if not spatial:
                members = [(0, np.mean([token for _, token in members], axis=0))]
            sims = []
            for p, token in members:
                total, norm = 0.0, 0.0
                for k in range(frames):
                    distance = abs(k - f)
                    near = distance <= d if cumulative else distance == d
                    if distance != 0 and not near:
                        continue
                    target = unit(teacher[k].mean(0)) if not spatial else teacher[k, p]
                    total += np.exp(-distance / tau) * (unit(token) @ target)
                    norm += np.exp(-distance / tau)
                sims.append(total / norm if normalize_sum else total)
            per_frame.append(np.mean(sims))
        value = np.mean(per_frame) if per_frame else 0.0
        values.append(value if mean_over_frames else value * frames)
    return np.array(values)


@pytest.fixture
def expected() -> Callable[..., np.ndarray]:
    return reference
