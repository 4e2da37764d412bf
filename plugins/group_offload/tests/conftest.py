"""Two models to stream: the toy family's, and a small raw one with everything that blocks are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hooktuner.context import Run
from hooktuner.family import BlockTokens, Keepable
from hooktuner.step import Step
from hooktuner.testing import ToyFamily, load_denoiser, make_batch, make_plugins, make_run, make_step
from hooktuner.train.adapters import prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner_group_offload.device import SimulatedDevice
from hooktuner_group_offload.options import GroupOffloadOptions
from hooktuner_group_offload.strategy import Offload
from torch import Tensor, nn
from torch.nn import functional as F


class RawBlock(nn.Module):
    """Frozen linear layers with and without bias, norms with weights, a convolution, a table of its own, a module
    kept in float32; and one trained layer."""

    def __init__(self, width: int, shared: nn.Parameter) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rms = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.table = nn.Parameter(torch.randn(2, width))
        self.kept = nn.Linear(width, width)
        self.shared = shared
        self.adapter = nn.Linear(width, width)
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        y = self.norm(x) * (1 + self.table[0]) + self.table[1] + self.shared
        y = self.down(F.gelu(self.up(y)))
        y = y + self.conv(x.transpose(1, 2)).transpose(1, 2)
        y = y + self.kept(self.rms(x + side).float()).to(x.dtype)
        return x + self.scale * (y + self.adapter(x.float()).to(x.dtype)).softmax(-1)


class RawModel(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, blocks: int = 5, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList([RawBlock(width, shared) for _ in range(blocks)])
        self.out = nn.Linear(width, width)
        self.to(dtype).requires_grad_(False)
        for block in self.blocks:
            assert isinstance(block, RawBlock)
            block.kept.float()
            block.adapter.float().requires_grad_(True)
        self.function: Callable[..., Any] | None = None

    def enable_gradient_checkpointing(self, function: Callable[..., Any]) -> None:
        self.function = function

    def disable_gradient_checkpointing(self) -> None:
        self.function = None

    def forward(self, x: Tensor) -> Tensor:
        side = x.flip(1)
        for block in self.blocks:
            x = self.function(block, x, side) if self.function and torch.is_grad_enabled() else block(x, side)
        return self.out(x)


class RawAnatomy:
    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return list(denoiser.blocks)  # type: ignore[arg-type]

    def extra_blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return []

    def read(self, args: tuple[Any, ...]) -> BlockTokens:
        return BlockTokens(args[0], (), None)

    def write(self, args: tuple[Any, ...], tokens: BlockTokens, kept_BK: Tensor | None) -> tuple[Any, ...]:
        return (tokens.tokens_BND, *args[1:])

    def keepable(self, args: tuple[Any, ...], step: Any) -> Keepable:
        return Keepable("none")

    def to_grid(self, tokens_BND: Tensor, args: tuple[Any, ...]) -> Tensor:
        return tokens_BND[:, None]


@dataclass
class Base:
    """What all trials share: a run of the toy family, a step, and the denoiser with an adapter that does something."""

    run: Run
    step: Step
    model: nn.Module


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    plugins = make_plugins(ToyFamily())
    run = make_run(plugins, None, tmp_path_factory.mktemp("toy"))
    model = load_denoiser(run, plugins)
    prepare_trainables(run, model)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then nothing reaches lora_A
            parameter.data.normal_(std=0.1)
    return Base(run, make_step(run, plugins, make_batch(run, plugins)), model)


class Trial:
    """A model with or without offload, and what its micro-steps give."""

    def __init__(
        self,
        base: Base,
        *,
        model: str = "toy",
        offload: bool = True,
        checkpointing: bool = True,
        interval: int = 1,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.options = GroupOffloadOptions(enable_group_offload=True, **options)
        self.run = run = replace(base.run, notes=[])
        self.step = base.step
        self.is_toy = model == "toy"
        self.model: nn.Module = copy.deepcopy(base.model) if self.is_toy else RawModel(dtype)
        if not self.is_toy:
            run.anatomy = RawAnatomy()
        self.offload: Offload | None = None
        inner = []
        if offload:
            self.offload = Offload(run, self.model, self.options)
            # as strict as CUDA: a weight that is not in a buffer is unusable
            self.offload._device._poison_absent = True  # type: ignore[attr-defined]
            assert isinstance(self.offload._device, SimulatedDevice)
            self.offload.place()
            inner = [self.offload.interceptor]
        self.runner = BlockRunner(self.model, run.anatomy, inner, Recompute(checkpointing, interval))
        self.runner.attach()

    def predict(self, rows: slice = slice(None)) -> Tensor:
        step = self.step
        if not self.is_toy:
            x = step.noisy_BCFHW[rows].flatten(1).reshape(-1, 16, 24)
            return self.model(x.to(self.model.out.weight.dtype))  # type: ignore[union-attr]
        words = [sample["words_LD"] for sample in step.batch.text[rows]]
        text = torch.nn.utils.rnn.pad_sequence(words, batch_first=True)
        return self.model(step.noisy_BCFHW[rows], step.timestep_B[rows], text, return_dict=False)[0]

    def micro(self, *, calls: int = 1, scale: float = 1.0) -> Tensor:
        """Forward and backward of the batch, in one call of the denoiser or one per sample; gradients add up."""
        with self.runner.during(self.step):
            parts = [self.predict(slice(i, i + 1)) for i in range(2)] if calls == 2 else [self.predict()]
            output = torch.cat(parts)
            (output.float().square().mean() * scale).backward()
        return output.detach()

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        assert found
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}

    def assert_same(self, other: Trial) -> None:
        """Gradients are equal bit for bit, and there are some."""
        first, second = self.gradients(), other.gradients()
        assert first.keys() == second.keys()
        assert any(gradient.abs().sum() > 0 for gradient in first.values())
        differing = [name for name in first if not torch.equal(first[name], second[name])]
        assert not differing, f"{len(differing)} of {len(first)} gradients differ, such as {differing[0]}"


@pytest.fixture
def trial(base: Base) -> Callable[..., Trial]:
    def make(**settings: Any) -> Trial:
        return Trial(base, **settings)

    return make
