"""Which weights are streamed, how they lie in memory, which blocks stay."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hooktuner_group_offload.layout import lay_out
from hooktuner_group_offload.plan import make_plan, spread
from hooktuner_group_offload.strategy import fitting
from torch import nn


def names(trial: Callable[..., Any], **settings: Any) -> set[str]:
    plan = trial(model="raw", **settings).offload.plan
    return {entry.name for group in plan.groups for entry in group.entries}


def test_blocks_stream_their_frozen_weights_and_nothing_else(trial: Callable[..., Any]) -> None:
    found = names(trial)
    own = ["norm.weight", "norm.bias", "rms.weight", "up.weight", "up.bias", "down.weight", "conv.weight", "conv.bias",
           "table", "kept.weight", "kept.bias"]  # fmt: skip
    assert found == {f"blocks.{block}.{name}" for block in range(5) for name in own}


def test_leaves_stream_what_a_layer_owns(trial: Callable[..., Any]) -> None:
    assert names(trial) - names(trial, group_offload_type="leaf_level") == {f"blocks.{b}.table" for b in range(5)}


def test_what_must_stay_is_on_the_device_and_told(trial: Callable[..., Any]) -> None:
    one = trial(model="raw", group_offload_type="leaf_level")
    assert one.offload.plan.fixed == 5 * 2 * 24 * 4 + 24 * 4  # the tables, and the shared parameter once
    assert any("GiB of frozen block weights are shared or" in note for note in one.run.notes)
    for name, tensor in [*one.model.named_parameters(), *one.model.named_buffers()]:
        inside = name.startswith("blocks.") and not any(
            part in name for part in ("adapter", "table", "shared", "scale")
        )
        assert bool(tensor.isnan().any()) == inside, name


def test_parameters_in_the_same_memory_stay() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)])
    model.requires_grad_(False)
    first, second, third = model.blocks
    second.weight.data = first.weight.data[:]
    plan = make_plan(model, [], [first, second, third], leaves=False)
    assert {entry.parameter for group in plan.groups for entry in group.entries} == {third.weight, third.bias}


def test_trained_parameters_are_never_laid_out() -> None:
    with pytest.raises(AssertionError, match="w is trained"):
        lay_out("g", 0, [("w", nn.Parameter(torch.zeros(2)))], device="cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bytes_survive_the_way_through_a_flat_copy(device: str) -> None:
    """Whatever the dtype, the strides, and where it began."""
    torch.manual_seed(0)
    whole = torch.randn(40)
    tensors = [
        torch.randn(3, 5), torch.randn(5, 3).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(()), torch.randn(7).to(torch.bfloat16), torch.randn(9).to(torch.float8_e4m3fn), whole[3:7],
        torch.arange(5, dtype=torch.int8), torch.randn(6)[::2],
    ]  # fmt: skip
    parameters = [(str(n), nn.Parameter(t, requires_grad=False)) for n, t in enumerate(tensors)]
    group = lay_out("g", 0, parameters, device=device)
    flat = group.gathered()
    for tensor, entry in zip(tensors, group.entries, strict=True):
        view = entry.view(flat)
        assert (view.dtype, view.shape, view.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert torch.equal(view.float(), tensor.float())
        wanted = tensor.data_ptr() % 64 if device == "cpu" else 0
        assert entry.offset % 64 == wanted
    ends = [(entry.offset, entry.offset + entry.span) for entry in group.entries]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] <= group.nbytes


@pytest.mark.parametrize("total", range(1, 12))
def test_resident_blocks_are_spread(total: int) -> None:
    for count in range(total + 2):
        found = sorted(spread(count, total))
        assert len(found) == min(count, total)
        gaps = [b - a for a, b in zip([-1, *found], [*found, total], strict=True)]
        if found:
            assert max(gaps) - min(gaps) <= total // (2 * len(found)) + 1
    assert spread(1, 9) == {4}
    assert spread(3, 9) == {1, 4, 7}


def test_how_many_fit() -> None:
    assert [fitting(room, [10] * 4) for room in (-5, 9, 10, 25, 40, 400)] == [0, 0, 1, 2, 4, 4]
    assert fitting(99, [100, 10, 10]) == 1  # the middle one; two would take the first
