"""The invariant: outputs and gradients with offload are those without, bit for bit, whatever the settings.

The simulation is as strict as it can be: a released buffer is NaN, and so is a weight that is not in a buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooktuner_group_offload.blocks import BlockResidency
from torch import nn

Make = Callable[..., Any]
"""Makes a `Trial` (conftest)."""

SETTINGS: list[dict[str, Any]] = [
    *({"group_offload_ring_depth": depth} for depth in (1, 2, 3, 4)),
    *({"group_offload_blocks_per_group": blocks} for blocks in (2, 3, 9)),
    *({"group_offload_resident_blocks": blocks} for blocks in (1, 3)),
    {"group_offload_use_stream": False},
    {"group_offload_type": "leaf_level"},
    {"group_offload_type": "leaf_level", "group_offload_ring_depth": 1},
    {"group_offload_type": "leaf_level", "group_offload_ring_depth": 4, "group_offload_resident_blocks": 2},
]
CHECKPOINTS: list[dict[str, Any]] = [{}, {"checkpointing": False}, {"interval": 2}]


def settings_id(settings: dict[str, Any]) -> str:
    return ",".join(f"{key.removeprefix('group_offload_')}={value}" for key, value in settings.items()) or "default"


@pytest.mark.parametrize("model", ["toy", "raw"])
@pytest.mark.parametrize("how", CHECKPOINTS, ids=settings_id)
@pytest.mark.parametrize("settings", SETTINGS, ids=settings_id)
def test_gradients_are_equal(trial: Make, model: str, how: dict[str, Any], settings: dict[str, Any]) -> None:
    resident, streamed = trial(model=model, offload=False, **how), trial(model=model, **how, **settings)
    for calls in (1, 2, 1):  # accumulated: nothing clears the gradients
        assert torch.equal(resident.micro(calls=calls), streamed.micro(calls=calls))
    resident.assert_same(streamed)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("how", CHECKPOINTS, ids=settings_id)
def test_mixed_dtypes(trial: Make, how: dict[str, Any], kind: str) -> None:
    """bfloat16 blocks with a module that stays in float32."""
    resident = trial(model="raw", offload=False, dtype=torch.bfloat16, **how)
    streamed = trial(model="raw", dtype=torch.bfloat16, group_offload_type=kind, **how)
    assert torch.equal(resident.micro(), streamed.micro())
    resident.assert_same(streamed)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("how", CHECKPOINTS, ids=settings_id)
def test_autocast(trial: Make, how: dict[str, Any], kind: str) -> None:
    """float32 weights under bfloat16 autocast, which the backward pass of a layer must repeat."""
    resident, streamed = trial(offload=False, **how), trial(group_offload_type=kind, **how)
    for one in (resident, streamed):
        with one.runner.during(one.step):
            with torch.autocast("cpu", torch.bfloat16):
                output = one.predict()
            output.float().square().mean().backward()
    resident.assert_same(streamed)


@pytest.mark.parametrize("settings", SETTINGS[::3], ids=settings_id)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("how", CHECKPOINTS, ids=settings_id)
def test_an_exception_leaves_a_clean_state(
    trial: Make, how: dict[str, Any], where: str, settings: dict[str, Any]
) -> None:
    resident, streamed = trial(offload=False, **how), trial(**how, **settings)
    resident.micro()

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    block = streamed.model.blocks[2]  # type: ignore[index,union-attr]
    if where == "forward":
        handle = block.feed_forward.register_forward_hook(stop)  # type: ignore[union-attr]
    else:
        weight = block.attention.to_v.lora_A["default"].weight  # type: ignore[union-attr,index]
        handle = weight.register_hook(stop)
    with pytest.raises(Stop):
        streamed.micro()
    handle.remove()
    assert streamed.offload is not None
    assert streamed.offload._ring.in_use() == []
    streamed.model.zero_grad(set_to_none=True)
    streamed.micro()
    resident.assert_same(streamed)


@pytest.mark.parametrize("settings", SETTINGS[::2], ids=settings_id)
def test_sampling_between_steps(trial: Make, settings: dict[str, Any]) -> None:
    """Without gradients the model calls its blocks itself: validation, rollouts; also when one of them fails."""
    resident, streamed = trial(offload=False), trial(**settings)
    resident.micro()
    with torch.no_grad():
        wanted = resident.predict()
    resident.micro()

    streamed.micro()
    with torch.no_grad():
        assert torch.equal(streamed.predict(), wanted)
        handle = streamed.model.blocks[1].attention.register_forward_hook(  # type: ignore[index,union-attr]
            lambda *_: (_ for _ in ()).throw(ZeroDivisionError)
        )
        with pytest.raises(ZeroDivisionError):
            streamed.predict()
        handle.remove()
        assert torch.equal(streamed.predict(), wanted)
    streamed.micro()
    resident.assert_same(streamed)


def test_a_tensor_that_is_used_elsewhere_too(trial: Make) -> None:
    """The input of a block, observed by a regularizer: another order of additions would change its gradient."""
    results = []
    for offload in (False, True):
        one = trial(offload=offload)
        kept: list[torch.Tensor] = []
        block = one.model.blocks[1]  # type: ignore[index,union-attr]
        handle = block.register_forward_hook(lambda _m, _a, output, kept=kept: kept.append(output))
        with one.runner.during(one.step):
            loss = one.predict().square().mean() + 3 * kept[0].sin().mean() + kept[0].square().mean() / 7
            loss.backward()
        handle.remove()
        results.append(one)
    results[0].assert_same(results[1])


def test_gradients_outside_of_a_step_are_refused(trial: Make) -> None:
    with pytest.raises(RuntimeError, match="was called with gradients outside of the block runner"):
        trial().predict()


# ----------------------------------------------------------------------------------------------- planted mistakes


class ReleasesAfterRecomputation(BlockResidency):
    """What a forward hook would do."""

    def recompute(self, serial: int, *args: Any) -> Any:
        try:
            return super().recompute(serial, *args)
        finally:
            self.done(serial)


class LetsAutogradKeepWeights(BlockResidency):
    def pack(self, tensor: torch.Tensor, serial: int) -> Any:
        return tensor


class ReleasesAfterUnpacking(BlockResidency):
    def unpack(self, kept: Any) -> torch.Tensor:
        found = super().unpack(kept)
        self.done(0)
        return found


class ReleasesBeforeTheBlock(BlockResidency):
    def forward(self, serial: int, group: Any, call: Any, proceed: Any) -> Any:
        self._ring.acquire(group, backward=False)
        self._ring.release(group)
        return proceed(call)


@pytest.mark.parametrize(
    ("mistake", "checkpointing"),
    [
        (ReleasesAfterRecomputation, True),
        (LetsAutogradKeepWeights, False),
        (ReleasesAfterUnpacking, False),
        (ReleasesBeforeTheBlock, True),
        (ReleasesBeforeTheBlock, False),
    ],
)
@pytest.mark.parametrize("depth", [1, 2, 4, 16])
def test_an_early_release_is_caught(trial: Make, mistake: type, checkpointing: bool, depth: int) -> None:
    """With every ring depth, also one in which all blocks have their place."""
    one = trial(checkpointing=checkpointing, group_offload_ring_depth=depth)
    assert one.offload is not None
    one.offload.interceptor.__class__ = mistake
    one.micro()
    assert not all(gradient.isfinite().all() for gradient in one.gradients().values())


def test_a_leaf_that_is_used_behind_its_back_is_caught(trial: Make) -> None:
    one = trial(group_offload_type="leaf_level")
    linear = one.model.blocks[0].feed_forward.up  # type: ignore[index,union-attr]
    base = linear.base_layer  # type: ignore[union-attr]
    assert isinstance(base, nn.Linear)
    assert base.weight.isnan().all()
