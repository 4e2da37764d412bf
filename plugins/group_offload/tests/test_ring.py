"""The scheduler: what is copied when, and what is kept."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hooktuner_group_offload.device import SimulatedDevice
from hooktuner_group_offload.layout import Group, lay_out
from hooktuner_group_offload.meter import Meter
from hooktuner_group_offload.ring import Ring
from torch import nn


class Scene:
    def __init__(self, depth: int, *, groups: int = 6, ahead: bool = True) -> None:
        self.meter = Meter()
        self.groups: list[Group] = []
        for number in range(groups):
            weight = nn.Parameter(torch.full((4,), float(number)), requires_grad=False)
            group = lay_out(f"g{number}", number, [(f"g{number}.weight", weight)], device="cpu")
            group.rest = group.gathered()
            self.groups.append(group)
        self.size = self.groups[0].nbytes
        self.ring = Ring(SimulatedDevice(self.meter, poison_absent=True), depth, ahead=ahead)
        self.ring.rebuild(self.groups)

    def visit(self, number: int, *, backward: bool = False) -> int:
        """Use a group once; the number of groups that were copied."""
        self.meter.open(self.clock)
        self.ring.acquire(self.groups[number], backward=backward)
        assert torch.equal(self.groups[number].entries[0].parameter.data, torch.full((4,), float(number)))
        self.ring.release(self.groups[number])
        return int(self.meter.report()["bytes_h2d"]) // self.size

    clock = 1

    def step(self) -> int:
        last = len(self.groups)
        forward = sum(self.visit(number) for number in range(last))
        return forward + sum(self.visit(number, backward=True) for number in reversed(range(last)))


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 9])
def test_groups_around_a_turn_are_not_copied_again(depth: int) -> None:
    scene = Scene(depth)
    scene.step()
    kept = min(depth, 6)
    assert scene.step() == 2 * (6 - kept)
    assert scene.step() == 2 * (6 - kept)


@pytest.mark.parametrize("backward", [False, True])
def test_the_next_groups_are_copied_ahead(backward: bool) -> None:
    scene = Scene(3)
    order = [5, 4, 3, 2, 1, 0] if backward else [0, 1, 2, 3, 4, 5]
    assert scene.visit(order[0], backward=backward) == 3  # itself and two ahead
    assert [scene.visit(number, backward=backward) for number in order[1:4]] == [1, 1, 1]


def test_without_a_stream_nothing_is_copied_ahead() -> None:
    scene = Scene(3, ahead=False)
    assert [scene.visit(number) for number in range(6)] == [1] * 6


def test_the_real_order_is_learned() -> None:
    """Groups that are used in another order than planned are there in time from the second pass on."""
    scene = Scene(2)
    order = [3, 0, 5, 1, 4, 2]
    for number in order * 2:
        scene.visit(number)
    for number, following in pairwise(order):
        scene.visit(number)
        assert scene.groups[following] in scene.ring._slot_of


def test_held_groups_stay_and_a_full_ring_says_so() -> None:
    scene = Scene(2)
    scene.ring.acquire(scene.groups[0], backward=False)
    scene.ring.acquire(scene.groups[4], backward=False)
    assert scene.ring.in_use() == [scene.groups[0], scene.groups[4]]
    with pytest.raises(RuntimeError, match="no buffer is free for g2; held are g0, g4"):
        scene.ring.acquire(scene.groups[2], backward=False)
    scene.ring.release(scene.groups[0])
    scene.ring.acquire(scene.groups[2], backward=False)
    assert float(scene.groups[4].entries[0].parameter.data[0]) == 4.0


def test_a_group_may_be_held_twice() -> None:
    scene = Scene(1)
    scene.ring.acquire(scene.groups[1], backward=False)
    scene.ring.acquire(scene.groups[1], backward=True)
    scene.ring.release(scene.groups[1])
    assert float(scene.groups[1].entries[0].parameter.data[0]) == 1.0
    scene.ring.release(scene.groups[1])
    assert scene.groups[1].entries[0].parameter.data.isnan().all()


def test_released_buffers_are_poisoned() -> None:
    scene = Scene(2)
    buffer = scene.ring.acquire(scene.groups[0], backward=False).buffer
    weight = scene.groups[0].entries[0].view(buffer)
    scene.ring.release(scene.groups[0])
    assert weight.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_poison_is_nan_in_every_format(dtype: torch.dtype) -> None:
    buffer = SimulatedDevice(Meter()).allocate(64)
    assert buffer.view(dtype).float().isnan().all()


def test_a_cleared_ring_holds_nothing() -> None:
    scene = Scene(3)
    assert scene.ring.nbytes == 3 * scene.size
    scene.step()
    scene.ring.clear()
    assert scene.ring.nbytes == 0
    assert not scene.ring.serves(scene.groups[0])
