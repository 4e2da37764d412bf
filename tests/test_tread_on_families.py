"""Routing on the real denoisers of the families with small random weights: text and image to video, dense and tiles."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import hooktuner
import pytest
import torch
from hooktuner.technique import BlockCall, BlockInterceptor
from hooktuner.testing import load_denoiser, make_batch, make_plugins, make_project, make_run, make_step
from hooktuner.train.blocks import BlockRunner, Recompute
from rich.console import Console
from torch import Tensor

FAMILY = "kandinsky5-video"
CAPTIONS = ("a dog", "a much longer tale of two cats that cross the bridge at dusk")
"""Of unequal length, so that the family calls its denoiser once for each."""


def middle(ratio: float, start: int = 1, end: int = -2) -> dict[str, Any]:
    return {"routes": [{"selection_ratio": ratio, "start_layer_idx": start, "end_layer_idx": end}]}


class Witness(BlockInterceptor):
    """Observes what blocks are given."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...] | None, BlockCall]] = []

    def call(self, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        rows = call.step.rows
        self.calls.append((None if rows is None else tuple(rows), call))
        return proceed(call)


class Bench:
    """A family's tiny denoiser with the plugin."""

    def __init__(self, folder: Path, flavour: str, config: Any, pixels: tuple[int, int, int]) -> None:
        self.plugins = make_plugins(FAMILY, "tread")
        self.run = make_run(
            self.plugins, flavour, folder, tread_config=config, tread_disable_after=1.0, model_type="full"
        )
        self.denoiser = load_denoiser(self.run, self.plugins)
        batch = make_batch(self.run, self.plugins, captions=CAPTIONS, pixels=pixels)
        self.step = make_step(self.run, self.plugins, batch)

    def forward(self, *, routed: bool = True, recompute: bool = False) -> tuple[Tensor, dict[str, Tensor], Witness]:
        """Velocity, gradients, and what blocks were given."""
        step = replace(self.step, noisy_BCFHW=self.step.noisy_BCFHW.clone().requires_grad_())
        self.denoiser.zero_grad(set_to_none=True)
        interceptors = [one for _, one in self.plugins.intercept_blocks(self.run, self.denoiser)] if routed else []
        witness = Witness()
        runner = BlockRunner(self.denoiser, self.run.anatomy, [*interceptors, witness], Recompute(enabled=recompute))
        runner.attach()
        with runner.during(step):
            velocity = self.plugins.predict(self.run, self.denoiser, step)
            (velocity - step.target_BCFHW).square().mean().backward()
        runner.detach()
        gradients = {name: value.grad for name, value in self.denoiser.named_parameters() if value.grad is not None}
        assert step.noisy_BCFHW.grad is not None
        return velocity.detach(), {**gradients, "input": step.noisy_BCFHW.grad}, witness


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """`bench(flavour, tread_config, pixels)`; clips of 3 x 4 x 4 tokens where no size is given."""
    made: list[Bench] = []

    def make(flavour: str = "tiny", config: Any = None, pixels: tuple[int, int, int] = (9, 64, 64)) -> Bench:
        made.append(Bench(tmp_path, flavour, config or middle(0.5), pixels))
        return made[-1]

    yield make
    for one in made:
        with closing(one.plugins), closing(one.run):
            pass


def assert_same(one: tuple[Tensor, dict[str, Tensor], Any], other: tuple[Tensor, dict[str, Tensor], Any]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


@pytest.mark.parametrize("flavour", ["tiny", "tiny-i2v"])
def test_ratio_zero_is_bit_identical(bench, flavour):
    bench = bench(flavour, middle(0.0))
    routed = bench.forward()
    assert all((call.kept_BK is not None) == (call.index in (1, 2)) for _, call in routed[2].calls)
    assert_same(routed, bench.forward(routed=False))


@pytest.mark.parametrize("flavour", ["tiny", "tiny-i2v"])
def test_recomputation_changes_no_bit(bench, flavour):
    bench = bench(flavour)
    routed = bench.forward()
    assert_same(routed, bench.forward(recompute=True))
    assert (routed[0] - bench.forward(routed=False)[0]).abs().max() > 1e-4


def test_every_position_and_every_trained_parameter_gets_a_gradient(bench):
    bench = bench()
    _, gradients, witness = bench.forward()
    assert {call.args[0].shape[1] for _, call in witness.calls if call.kept_BK is not None} == {24}
    _, dense, _ = bench.forward(routed=False)
    assert gradients.keys() == dense.keys()
    assert all((gradient != 0).any() == (dense[name] != 0).any() for name, gradient in gradients.items())
    assert (gradients["input"] != 0).all()


def test_positions_of_kept_tokens_are_theirs(bench):
    _, _, witness = bench().forward()
    tables = {rows: call.args[3] for rows, call in witness.calls if call.index == 0}
    for rows, call in witness.calls:
        if call.kept_BK is not None:
            assert torch.equal(call.args[3][0], tables[rows][0, call.kept_BK[0]])


def test_each_call_of_the_denoiser_routes_its_own_samples(bench):
    """Captions of unequal length are two calls; the samples' masks are those that they have alone."""
    bench = bench()
    _, _, witness = bench.forward()
    kept = {rows: call.kept_BK for rows, call in witness.calls if call.index == 1}
    assert set(kept) == {(0,), (1,)}
    assert not torch.equal(kept[0,], kept[1,])
    batch = bench.step.batch
    same = replace(batch, text=[batch.text[0], batch.text[0]])
    bench.step = make_step(bench.run, bench.plugins, same)
    _, _, together = bench.forward()
    ((rows, call),) = [(rows, call) for rows, call in together.calls if call.index == 1]
    assert rows in (None, (0, 1))
    assert torch.equal(call.kept_BK, torch.cat([kept[0,], kept[1,]]))


def test_a_given_first_frame_is_kept(bench):
    _, _, witness = bench("tiny-i2v", middle(0.5)).forward()
    for _, call in witness.calls:
        if call.kept_BK is not None:
            assert call.kept_BK.shape == (1, 24)
            assert torch.equal(call.kept_BK[0, :16], torch.arange(16))
    _, _, text = bench("tiny").forward()
    assert any(not torch.equal(call.kept_BK[0, :16], torch.arange(16)) for _, call in text.calls if call.index == 1)


def test_whole_tiles_with_block_sparse_attention(bench, monkeypatch):
    """Tokens of sparse clips are in tiles of 64. On a CPU the family's block mask becomes an ordinary one."""
    from diffusers.models.transformers import transformer_kandinsky
    from hooktuner_kandinsky5_video.attention import nabla_params

    masks = []

    def mask_of(q: Tensor, k: Tensor, sta: Tensor, thr: float = 0.9) -> Tensor:
        assert sta.shape[-2:] == (q.shape[1] // 64, q.shape[1] // 64)
        masks.append(sta)
        dense = sta.expand(q.shape[0], 1, -1, -1).repeat_interleave(64, -1).repeat_interleave(64, -2)
        return dense.expand(-1, q.shape[2], -1, -1)

    monkeypatch.setattr(transformer_kandinsky, "nablaT_v2", mask_of)
    monkeypatch.setattr(
        "hooktuner_kandinsky5_video.predict.sparse_params",
        lambda run, denoiser, latents: nabla_params(denoiser.config, latents),
    )
    size = (5, 256, 256)  # 2 frames of 2 x 2 tiles
    bench_half = bench("tiny-nabla", middle(0.5), size)
    _, gradients, witness = bench_half.forward()
    kept = [call.kept_BK for _, call in witness.calls if call.kept_BK is not None]
    assert kept
    for index in kept:
        tiles = index.reshape(1, 4, 64)
        assert torch.equal(tiles, tiles[:, :, :1] // 64 * 64 + torch.arange(64))
    assert {mask.shape[-1] for mask in masks} == {4, 8}
    assert (gradients["input"] != 0).any(dim=1).all()
    bench_all = bench("tiny-nabla", middle(0.0), size)
    assert_same(bench_all.forward(), bench_all.forward(routed=False))


@pytest.mark.parametrize("flavour", ["tiny", "tiny-i2v"])
@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_training(tmp_path, monkeypatch, flavour, model_type):
    monkeypatch.setenv("HOOKTUNER_HOME", str(tmp_path / "home"))
    path = make_project(
        tmp_path, family=FAMILY, flavour=flavour, model_type=model_type, tread_config=middle(0.5),
        tread_disable_after=0.5,
    )  # fmt: skip
    result = hooktuner.run(path, console=Console(file=io.StringIO()))
    assert len(result.losses) == 2
    assert all(torch.isfinite(torch.tensor(result.losses)))
    plain = hooktuner.run(
        make_project(tmp_path / "plain", family=FAMILY, flavour=flavour, model_type=model_type),
        console=Console(file=io.StringIO()),
    )
    assert plain.losses[0] != result.losses[0]
