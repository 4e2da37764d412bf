"""Which weights stream, in which groups, and which blocks stay on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hooktuner_group_offload.layout import Group, lay_out


@dataclass(frozen=True)
class Unit:
    """What becomes resident at once: some blocks and their groups."""

    blocks: tuple[nn.Module, ...]
    groups: tuple[Group, ...]
    leaves: tuple[nn.Module, ...] = ()
    """With groups of leaves: the module of each group."""

    @property
    def nbytes(self) -> int:
        """Bytes of all groups."""
        return sum(group.nbytes for group in self.groups)


@dataclass(frozen=True)
class Plan:
    """Units in the order of the forward pass. `fixed`: bytes of frozen block weights that cannot be streamed."""

    units: tuple[Unit, ...]
    fixed: int

    @property
    def groups(self) -> list[Group]:
        """All groups, in the order of the forward pass."""
        return [group for unit in self.units for group in unit.groups]


def make_plan(
    model: nn.Module,
    extra_blocks: Sequence[nn.Module],
    blocks: Sequence[nn.Module],
    *,
    leaves: bool,
    blocks_per_group: int = 1,
    device: str = "cpu",
) -> Plan:
    """Group the frozen weights of the blocks for a kind of device (`cpu`, `cuda`).

    Extra blocks (text refiners) come before the main blocks, as models
    run them; where one does not, prefetching learns the order in the first step.

    Not streamed, and so on the device all the time: trained parameters; parameters that several blocks or modules
    share; tensor subclasses; with `leaves` also parameters that a module with children owns itself.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    streamable = _streamable(model, [*extra_blocks, *blocks])
    units: list[Unit] = []
    for members in (extra_blocks, blocks):
        for first in range(0, len(members), blocks_per_group):
            chosen = tuple(members[first : first + blocks_per_group])
            groups, modules = _groups(chosen, len(units), streamable, names, leaves, device)
            if groups:
                units.append(Unit(chosen, tuple(groups), tuple(modules)))
    planned = sum(entry.span for unit in units for group in unit.groups for entry in group.entries)
    frozen = {id(p): p for block in [*extra_blocks, *blocks] for p in block.parameters() if not p.requires_grad}
    everything = sum(parameter.numel() * parameter.element_size() for parameter in frozen.values())
    return Plan(tuple(units), max(everything - planned, 0))


def _groups(
    blocks: Sequence[nn.Module],
    unit: int,
    streamable: set[int],
    names: dict[int, str],
    leaves: bool,
    device: str,
) -> tuple[list[Group], list[nn.Module]]:
    modules: Iterable[Sequence[nn.Module]] = [blocks]
    if leaves:
        modules = [[leaf] for block in blocks for leaf in block.modules() if not any(leaf.children())]
    groups, owners = [], []
    for members in modules:
        parameters = {id(p): p for member in members for p in member.parameters() if id(p) in streamable}
        if parameters:
            named = [(names[key], parameter) for key, parameter in parameters.items()]
            groups.append(lay_out(named[0][0].rpartition(".")[0], unit, named, device=device))
            owners.append(members[0])
    return groups, owners if leaves else []


def _streamable(model: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """Ids of frozen, plain parameters that live in exactly one place."""
    homes: Counter[int] = Counter()
    for block in blocks:
        homes.update({id(parameter) for parameter in block.parameters()})
    # Parameters that a module owns under two names, or that the model uses outside of the block, have more uses.
    uses: Counter[int] = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    overlapping = _overlapping(model.parameters())
    return {
        id(parameter)
        for block in blocks
        for parameter in block.parameters()
        if not parameter.requires_grad
        and parameter.layout == torch.strided
        and type(parameter.data) is Tensor
        and parameter.numel() > 0
        and homes[id(parameter)] == 1
        and uses[id(parameter)] == 1
        and id(parameter) not in overlapping
    }


def _overlapping(parameters: Iterable[nn.Parameter]) -> set[int]:
    """Ids of different parameters that share memory."""
    ranges = sorted(
        (parameter.data_ptr(), parameter.data_ptr() + parameter.numel() * parameter.element_size(), id(parameter))
        for parameter in parameters
        if type(parameter.data) is Tensor and parameter.layout == torch.strided and parameter.data_ptr()
    )
    found: set[int] = set()
    end, last = 0, 0
    for start, stop, key in ranges:
        if start < end:
            found |= {key, last}
        if stop > end:
            end, last = stop, key
    return found


def spread(count: int, total: int) -> frozenset[int]:
    """`count` of `total` positions, as evenly as possible, so that every copy has work to hide behind."""
    count = min(count, total)
    return frozenset((2 * number + 1) * total // (2 * count) for number in range(count))
