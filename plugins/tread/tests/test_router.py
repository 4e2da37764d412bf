"""Routing on the toy model: the equations, gradients, determinism, several routes, units, recomputation.

The strongest test compares a routed model with a dense one in which nobody attends to dropped tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hooktuner.context import Run
from hooktuner.errors import ModelError, PluginError
from hooktuner.events import TrainingStarted
from hooktuner.family import BlockTokens, Grid, Keepable, ModelCard
from hooktuner.hookspecs import hookimpl
from hooktuner.plugins import PluginSet
from hooktuner.step import Step
from hooktuner.technique import BlockCall, BlockInterceptor
from hooktuner.testing import ToyAnatomy, ToyFamily, load_denoiser, make_batch, make_plugins, make_run, make_step
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner_tread.options import TreadConfig
from hooktuner_tread.plugin import Tread
from hooktuner_tread.routes import resolve
from torch import Tensor, nn

MIDDLE = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
"""Blocks 1 and 2 of the toy's 4 on half of the tokens."""


def routes(*items: tuple[float, int, int]) -> dict[str, Any]:
    """A `tread_config` from (ratio, start, end)."""
    names = ("selection_ratio", "start_layer_idx", "end_layer_idx")
    return {"routes": [dict(zip(names, item, strict=True)) for item in items]}


class Witness(BlockInterceptor):
    """Observes what blocks are given: (block, kept_BK, tokens, sides) of each call."""

    def __init__(self) -> None:
        self.calls: list[BlockCall] = []
        self.outputs: list[Tensor] = []

    def call(self, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        self.calls.append(call)
        out = proceed(call)
        self.outputs.append(out)
        return out

    def kept(self, block: int, forward: int = 0) -> Tensor:
        """The kept tokens in the call of a block."""
        index = [call.kept_BK for call in self.calls if call.index == block][forward]
        assert index is not None
        return index


@dataclass
class Bench:
    """A toy model with the plugin, ready for forward and backward passes."""

    run: Run
    plugins: PluginSet
    denoiser: nn.Module
    step: Step

    def forward(
        self,
        routed: bool = True,
        *,
        witness: Witness | None = None,
        recompute: bool = False,
        step: Step | None = None,
        backward: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(velocity, gradients of the input and of every parameter) of one micro-step."""
        step = step or self.step
        step = replace(step, noisy_BCFHW=step.noisy_BCFHW.clone().requires_grad_())
        self.denoiser.zero_grad(set_to_none=True)
        interceptors = [one for _, one in self.plugins.intercept_blocks(self.run, self.denoiser)] if routed else []
        interceptors += [witness] if witness else []
        runner = BlockRunner(self.denoiser, self.run.anatomy, interceptors, Recompute(enabled=recompute))
        runner.attach()
        gradients = {}
        with runner.during(step):
            velocity = self.plugins.predict(self.run, self.denoiser, step)
            if backward:
                (velocity - step.target_BCFHW).square().mean().backward()
                gradients = {name: value.grad for name, value in self.denoiser.named_parameters()}
                gradients["input"] = step.noisy_BCFHW.grad
        runner.detach()
        return velocity.detach(), gradients


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Velocity and all gradients are equal bit for bit."""
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert gradient is not None, name
        assert torch.equal(gradient, other[1][name]), name


class Family(ToyFamily):
    """The toy family with another anatomy."""

    def __init__(self, anatomy: ToyAnatomy | None = None, change: Callable[[nn.Module], None] | None = None) -> None:
        self.anatomy = anatomy
        self.change = change

    @hookimpl
    def describe_model(self, run: Run) -> ModelCard:
        card = super().describe_model(run)
        return replace(card, anatomy=lambda run: self.anatomy) if self.anatomy else card

    @hookimpl
    def load_model(self, run: Run, part: Any) -> Any:
        loaded = super().load_model(run, part)
        if self.change is not None and isinstance(loaded, nn.Module) and hasattr(loaded, "patch_in"):
            self.change(loaded)
        return loaded


class TileAnatomy(ToyAnatomy):
    """Blocks that take whole tiles of four tokens."""

    def keepable(self, args: tuple[Any, ...], step: Any) -> Keepable:
        return replace(super().keepable(args, step), unit="tiles", tile=4)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    """`bench(tread_config, …)`: clips of 3 x 4 x 4 tokens, two samples, four blocks."""

    def make(
        config: Any = MIDDLE,
        *,
        family: Any = None,
        flavour: str = "toy",
        captions: Sequence[str] = ("a dog", "two cats on a bridge"),
        first_index: int = 0,
        number: int = 1,
        **keys: Any,
    ) -> Bench:
        plugins = make_plugins(family or ToyFamily(), Tread())
        values = {"tread_disable_after": 1.0, "model_type": "full", "max_train_steps": 10, **keys}
        run = make_run(plugins, flavour, tmp_path, tread_config=config, **values)
        denoiser = load_denoiser(run, plugins)
        batch = make_batch(run, plugins, captions=captions, pixels=(9, 64, 64), first_index=first_index)
        return Bench(run, plugins, denoiser, make_step(run, plugins, batch, number=number))

    return make


# ------------------------------------------------------------------------------------------------- the equations


class MaskedAttention(nn.Module):
    """A self-attention of the toy in which only the tokens of `kept_BK` are attended to."""

    def __init__(self, attention: nn.Module, kept_BK: Tensor, tokens: int) -> None:
        super().__init__()
        self.attention = attention
        self.mask_BL = torch.zeros(kept_BK.shape[0], tokens, dtype=torch.bool).scatter(1, kept_BK, True)

    def forward(self, x: Tensor, context: Tensor, rope: Tensor) -> Tensor:
        return self.attention(x, context, rope=rope, mask_BL=self.mask_BL)


def masked_dense(bench: Bench, spans: dict[tuple[int, int], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same forward and backward with whole sequences: within a span (start, end) dropped tokens are not attended
    to, and behind it they get their old value back."""
    step = replace(bench.step, noisy_BCFHW=bench.step.noisy_BCFHW.clone().requires_grad_())
    numbers = {id(block): number for number, block in enumerate(bench.denoiser.blocks)}
    saved: dict[int, Tensor] = {}

    def call(block: nn.Module, *args: Any) -> Tensor:
        number = numbers.get(id(block))
        span = next((span for span in spans if number is not None and span[0] <= number <= span[1]), None)
        if span is None:
            return block(*args)
        kept_BK = spans[span]
        saved.setdefault(span[0], args[0])
        attention = block.attention
        block.attention = MaskedAttention(attention, kept_BK, args[0].shape[1])
        out = block(*args)
        is_kept = block.attention.mask_BL
        block.attention = attention
        return torch.where(is_kept[..., None], out, saved[span[0]]) if number == span[1] else out

    bench.denoiser.zero_grad(set_to_none=True)
    bench.denoiser.enable_gradient_checkpointing(call)
    velocity = bench.plugins.predict(bench.run, bench.denoiser, step)
    (velocity - step.target_BCFHW).square().mean().backward()
    gradients = {name: value.grad for name, value in bench.denoiser.named_parameters()}
    return velocity.detach(), {**gradients, "input": step.noisy_BCFHW.grad}


@pytest.mark.parametrize("config", [MIDDLE, routes((0.75, 0, 0), (0.25, 2, 2)), routes((0.9, 1, 2))])
def test_routing_equals_dense_attention_without_the_dropped_tokens(bench, config):
    bench, witness = bench(config), Witness()
    velocity, gradients = bench.forward(witness=witness)
    kept = {(span.start, span.end): witness.kept(span.start) for span in resolve(TreadConfig(**config), 4, "toy")}
    dense_velocity, dense_gradients = masked_dense(bench, kept)
    assert (velocity - dense_velocity).abs().max() < 1e-5
    for name, gradient in gradients.items():
        assert (gradient - dense_gradients[name]).abs().max() < 1e-5 * max(1, dense_gradients[name].abs().max()), name
    unrouted, _ = bench.forward(routed=False)
    assert (velocity - unrouted).abs().max() > 1e-2, "the comparison says nothing if routing changes nothing"


def test_ratio_zero_is_bit_identical(bench):
    bench, witness = bench(routes((0.0, 1, 2))), Witness()
    routed = bench.forward(witness=witness)
    assert torch.equal(witness.kept(1), torch.arange(48).expand(2, -1)), "it goes through the router"
    assert_same(routed, bench.forward(routed=False))


def test_dropped_tokens_return_with_the_value_they_had(bench):
    bench, witness = bench(), Witness()
    bench.forward(witness=witness)
    before, after = witness.outputs[0], witness.calls[3].args[0]
    is_kept = torch.zeros(2, 48, dtype=torch.bool).scatter(1, witness.kept(1), True)
    assert torch.equal(after[~is_kept], before[~is_kept])
    assert torch.equal(after[is_kept].reshape(2, 24, -1), witness.outputs[2])
    assert (after[is_kept] != before[is_kept]).any(-1).all()


def test_every_position_and_every_parameter_gets_a_gradient(bench):
    bench, witness = bench(), Witness()
    _, gradients = bench.forward(witness=witness)
    assert witness.kept(1).shape == (2, 24)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())
    assert (gradients["input"] != 0).all()


def test_blocks_in_the_route_get_shorter_sequences_and_their_positions(bench):
    bench, witness = bench(), Witness()
    bench.forward(witness=witness)
    kept = witness.kept(1)
    table = witness.calls[0].args[3].flatten(1, 3)
    for call, routed in zip(witness.calls, (False, True, True, False), strict=True):
        assert (call.kept_BK is not None) == routed
        assert call.args[0].shape[:2] == ((2, 24) if routed else (2, 48))
        if routed:
            assert torch.equal(call.kept_BK, kept)
            assert all(torch.equal(call.args[3][row], table[0, kept[row]]) for row in range(2))
    assert witness.calls[1].args[3] is witness.calls[2].args[3], "positions are gathered once for a route"


def test_a_side_tensor_that_changes_between_blocks_is_gathered_again(bench):
    class Drifting(ToyAnatomy):
        """Hands out another table in every call, as a model with positions per block would."""

        def read(self, args):
            view = super().read(args)
            self.count = getattr(self, "count", 0) + 1
            return replace(view, sides=((view.sides[0][0] + self.count, 1),))

    bench, witness = bench(family=Family(Drifting())), Witness()
    bench.forward(witness=witness)
    one, two = (call.args[3] for call in witness.calls[1:3])
    assert (two - one - 1).abs().max() < 1e-5


def test_recomputation_changes_no_bit(bench):
    bench = bench()
    assert_same(bench.forward(recompute=True), bench.forward(recompute=False))


def test_several_routes(bench):
    bench, witness = bench(routes((0.25, -2, -2), (0.5, 0, 1))), Witness()
    bench.forward(witness=witness)
    assert [call.args[0].shape[1] for call in witness.calls] == [24, 24, 36, 48]
    assert witness.kept(0).shape == (2, 24)
    both = {tuple(sorted(set(range(48)) - set(witness.kept(block)[0].tolist()))) for block in (0, 2)}
    assert len(both) == 2
    assert not set(min(both, key=len)) <= set(max(both, key=len)), "routes draw for themselves"


@pytest.mark.parametrize("config", [routes((0.5, -3, -2)), routes((0.5, 1, 2)), routes((0.5, -3, 2))])
def test_negative_indices_count_from_the_end(bench, config):
    bench, reference = bench(config), bench(MIDDLE)
    assert_same(bench.forward(), reference.forward())


# ------------------------------------------------------------------------------------------------- which are kept


def kept_of(bench: Bench, **how: Any) -> Tensor:
    witness = Witness()
    bench.forward(witness=witness, backward=False, **how)
    return witness.kept(1)


def test_the_choice_is_a_function_of_seed_and_sample(bench):
    first = kept_of(bench())
    assert (first.diff(dim=1) > 0).all(), "sorted, without repetition"
    assert torch.equal(first, kept_of(bench()))
    torch.manual_seed(5)
    assert torch.equal(first, kept_of(bench(number=7))), "neither torch's stream nor the step's number matters"
    assert not torch.equal(first, kept_of(bench(seed=43)))
    assert not torch.equal(first[0], first[1])
    later = kept_of(bench(first_index=1))
    assert torch.equal(later[0], first[1]), "the sample's number matters, not its place in the batch"
    assert not torch.equal(later[1], first[0])


def test_drawing_leaves_the_global_stream_alone(bench):
    bench = bench()
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    bench.forward()
    assert torch.equal(torch.rand(1), wanted)


def test_given_tokens_are_always_kept(bench):
    bench = bench(routes((0.9, 1, 2)), flavour="toy-i2v")
    kept = kept_of(bench)
    assert kept.shape == (2, 16), "the first frame is more than a tenth"
    assert torch.equal(kept, torch.arange(16).expand(2, -1))
    given = bench.step.conditioning.given_B1FHW.clone()
    given[1] = False
    bench.step.conditioning = replace(bench.step.conditioning, given_B1FHW=given)
    kept = kept_of(bench)
    assert kept.shape == (2, 16), "samples of a call keep equally many"
    assert torch.equal(kept[0], torch.arange(16))
    assert (kept[1] >= 16).any()


def test_rows_say_which_samples_a_call_has(bench):
    """A family that calls its denoiser once per sample: each call gets what the sample gets in the whole batch."""

    class OneByOne(Family):
        @hookimpl
        def predict(self, run: Run, denoiser: nn.Module, step: Step) -> Tensor:
            outputs = []
            for row in (1, 0):
                step.rows = [row]
                one = replace(
                    step,
                    noisy_BCFHW=step.noisy_BCFHW[row : row + 1],
                    timestep_B=step.timestep_B[row : row + 1],
                    batch=replace(step.batch, text=[step.batch.text[row]]),
                )
                outputs.append(super().predict(run, denoiser, one))
            step.rows = None
            return torch.cat([outputs[1], outputs[0]])

    together, apart, witness = bench(), bench(family=OneByOne()), Witness()
    velocity, gradients = apart.forward(witness=witness)
    whole = kept_of(together)
    assert torch.equal(witness.kept(1, 0), whole[1:])
    assert torch.equal(witness.kept(1, 1), whole[:1])
    wanted, wanted_gradients = together.forward()
    assert (velocity - wanted).abs().max() < 1e-5
    assert (gradients["input"] - wanted_gradients["input"]).abs().max() < 1e-6


def test_rows_that_do_not_fit_are_named(bench):
    class Halves(Family):
        @hookimpl
        def predict(self, run: Run, denoiser: nn.Module, step: Step) -> Tensor:
            halves = [
                super(Halves, self).predict(
                    run,
                    denoiser,
                    replace(
                        step,
                        noisy_BCFHW=step.noisy_BCFHW[row : row + 1],
                        timestep_B=step.timestep_B[row : row + 1],
                        batch=replace(step.batch, text=[step.batch.text[row]]),
                    ),
                )
                for row in (0, 1)
            ]
            return torch.cat(halves)

    with pytest.raises(ModelError, match="a block was called with 1 samples, and the step under way has 2"):
        bench(family=Halves()).forward()


# ------------------------------------------------------------------------------------------------- when it is off


@pytest.mark.parametrize(
    ("share", "total", "last"),
    [(0.5, 10, 5), (0.85, 100, 85), (0.29, 100, 29), (0.7, 10, 7), (0.85, 1, 1), (1.0, 7, 7)],
)
def test_routing_ends_exactly_there(bench, share, total, last):
    bench = bench(tread_disable_after=share, max_train_steps=total)
    for number, wanted in ((1, 24), (last, 24), (last + 1, 48), (total + 1, 48)):
        witness = Witness()
        bench.forward(witness=witness, step=replace(bench.step, number=number), backward=False)
        assert witness.calls[1].args[0].shape[1] == wanted, number
    dense = bench.forward(step=replace(bench.step, number=last + 1))
    assert_same(dense, bench.forward(routed=False))


def test_the_length_of_a_run_counted_in_epochs_comes_with_its_start(bench):
    bench = bench(tread_disable_after=0.5, max_train_steps=None, num_train_epochs=3)
    with pytest.raises(PluginError, match="the length of the run is not known"):
        bench.forward()
    (_, router), *_ = bench.plugins.intercept_blocks(bench.run, bench.denoiser)
    bench.plugins.on_event(bench.run, TrainingStarted(1, 9))
    assert router.routed_steps == 5


def test_default_share(bench):
    for model_type, share in (("lora", 0.85), ("full", 1.0)):
        bench_ = bench(tread_disable_after=None, model_type=model_type, max_train_steps=100)
        (_, router), *_ = bench_.plugins.intercept_blocks(bench_.run, bench_.denoiser)
        assert router.routed_steps == 100 * share


def test_off_without_gradients(bench):
    bench, witness = bench(), Witness()
    interceptors = [one for _, one in bench.plugins.intercept_blocks(bench.run, bench.denoiser)]
    runner = BlockRunner(bench.denoiser, bench.run.anatomy, [*interceptors, witness], Recompute())
    runner.attach()
    with torch.no_grad(), runner.during(bench.step):
        velocity = bench.plugins.predict(bench.run, bench.denoiser, bench.step)
    assert not witness.calls
    assert torch.equal(velocity, bench.forward(routed=False)[0])


def test_an_exception_in_a_route_leaves_nothing(bench):
    bench = bench()
    (_, router), *_ = bench.plugins.intercept_blocks(bench.run, bench.denoiser)

    class Broken(BlockInterceptor):
        def call(self, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
            if call.index == 2:
                raise RuntimeError("broken")
            return proceed(call)

    runner = BlockRunner(bench.denoiser, bench.run.anatomy, [router, Broken()], Recompute())
    runner.attach()
    with pytest.raises(RuntimeError, match="broken"), runner.during(bench.step):
        bench.plugins.predict(bench.run, bench.denoiser, bench.step)
    assert router._open is None
    runner.detach()
    assert bench.forward()[0].isfinite().all()


def test_a_model_that_skips_a_block_of_a_route_is_named(bench):
    def skip(denoiser: nn.Module) -> None:
        denoiser._call = lambda block, *args: (  # type: ignore[assignment]
            args[0] if block is denoiser.blocks[1] else type(denoiser)._call(denoiser, block, *args)
        )

    with pytest.raises(ModelError, match=r"tread_config.routes\[0\] — the model called block 2 where block 1 was due"):
        bench(family=Family(change=skip)).forward()


def test_two_routers_are_refused(bench):
    bench = bench()
    pair = [bench.plugins.intercept_blocks(bench.run, bench.denoiser)[0][1] for _ in range(2)]
    runner = BlockRunner(bench.denoiser, bench.run.anatomy, pair, Recompute())
    runner.attach()
    with pytest.raises(PluginError, match="another plugin has routed block 1 already"), runner.during(bench.step):
        bench.plugins.predict(bench.run, bench.denoiser, bench.step)


# ------------------------------------------------------------------------------------------------- units


def test_whole_tiles(bench):
    bench, witness = bench(routes((0.6, 1, 2)), family=Family(TileAnatomy())), Witness()
    bench.forward(witness=witness)
    kept = witness.kept(1).reshape(2, -1, 4)
    assert kept.shape[1] == 12 - 7
    assert (kept[:, :, 0] % 4 == 0).all()
    assert torch.equal(kept, kept[:, :, :1] + torch.arange(4))
    assert not torch.equal(kept[0], kept[1])


class GridAnatomy(ToyAnatomy):
    """Blocks that need the grid of their tokens: the table keeps its shape."""

    def write(self, args: tuple[Any, ...], tokens: BlockTokens, kept_BK: Tensor | None) -> tuple[Any, ...]:
        grid = tokens.grid
        assert grid is not None
        rope = tokens.sides[0][0].unflatten(1, (grid.frames, grid.rows, grid.columns))
        return (tokens.tokens_BND, args[1], args[2], rope, args[4])

    def keepable(self, args: tuple[Any, ...], step: Any) -> Keepable:
        return replace(super().keepable(args, step), unit="sub_grid")


class Mixed(nn.Module):
    """A feed-forward followed by a depthwise convolution over frames, rows and columns."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.conv = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.grid = Grid(0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.inner(x).transpose(1, 2).unflatten(2, (self.grid.frames, self.grid.rows, self.grid.columns))
        return self.conv(grid).flatten(2).transpose(1, 2)


def with_convolutions(denoiser: nn.Module) -> None:
    """Every block gets a convolution that reads its grid from the rotary table, as it is given."""
    torch.manual_seed(1)
    for block in denoiser.blocks:
        block.feed_forward = Mixed(block.feed_forward, 64)

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            module.feed_forward.grid = Grid(*args[3].shape[1:4])

        block.register_forward_pre_hook(look)


def test_sub_grids(bench):
    bench, witness = bench(family=Family(GridAnatomy(), with_convolutions)), Witness()
    _, gradients = bench.forward(witness=witness)
    kept = witness.kept(1)
    assert kept.shape == (2, 3 * 3 * 3)
    assert [tuple(call.args[3].shape[:4]) for call in witness.calls] == [
        (1, 3, 4, 4), (2, 3, 3, 3), (2, 3, 3, 3), (1, 3, 4, 4),
    ]  # fmt: skip
    for index in kept:
        frames, rows, columns = index // 16, index // 4 % 4, index % 4
        sets = [sorted(set(one.tolist())) for one in (frames, rows, columns)]
        assert sets[0] == [0, 1, 2]
        assert [len(one) for one in sets] == [3, 3, 3]
        product = torch.tensor([(f * 4 + r) * 4 + c for f in sets[0] for r in sets[1] for c in sets[2]])
        assert torch.equal(index, product)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_sub_grids_at_ratio_zero_are_bit_identical(bench):
    bench = bench(routes((0.0, 1, 2)), family=Family(GridAnatomy(), with_convolutions))
    assert_same(bench.forward(), bench.forward(routed=False))


def test_sub_grids_drop_frames_where_a_first_frame_is_given(bench):
    bench, witness = bench(family=Family(GridAnatomy(), with_convolutions), flavour="toy-i2v"), Witness()
    bench.forward(witness=witness)
    kept = witness.kept(1)
    assert kept.shape == (2, 2 * 16)
    assert torch.equal(kept[:, :16], torch.arange(16).expand(2, -1))
    assert tuple(witness.calls[1].args[3].shape[1:4]) == (2, 4, 4)
