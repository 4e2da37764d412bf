"""Groups of blocks: their weights are there while a block computes, forward, recomputed and backward.

A block's weights are needed (1) in its forward call, (2) with gradient checkpointing in its recomputation, and from
there to the end of its backward, (3) without it whenever autograd reads a saved weight in its backward.

Who gives them up in (2) and (3)? Not forward hooks: a recomputation usually ends by an exception before the block
returns, and the backward comes after it anyway. Autograd runs the nodes of a graph in the reverse order of their
creation, so when the gradient of a tensor that a block was *given* is complete, everything that the block created has
run. A hook on that tensor is told so. (An identity function on the input, which would be told the same, is one more
addend in the sum of gradients of a tensor that is used elsewhere, and changes its bits.) For the same reason the
first request of an earlier call says that later calls are done: that covers blocks whose input needs no gradient, and
`end` covers the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hooktuner.step import Step
from hooktuner.technique import BlockCall, BlockInterceptor
from torch import Tensor, nn

from hooktuner_group_offload import NAME
from hooktuner_group_offload.layout import Group
from hooktuner_group_offload.ring import Ring


@dataclass(frozen=True)
class SavedWeight:
    """What autograd keeps instead of a streamed weight, or a view of one: where it lies in its group."""

    serial: int
    group: Group
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """In elements of `dtype`, from the beginning of the buffer."""


class BlockResidency(BlockInterceptor):
    """Brings the weights of the block that is called. `group_of`: by `id` of the block."""

    stage = "reside"

    def __init__(self, ring: Ring, group_of: Mapping[int, Group], on_begin: Callable[[Step], None]) -> None:
        self._ring = ring
        self._group_of = group_of
        self._on_begin = on_begin
        self._serial = 0
        self._held: dict[int, Group] = {}
        """What the backward pass holds, by serial number of the forward call."""
        self._sampling: list[Group] = []
        self._inside = 0
        self._handles: list[Any] = []

    # ------------------------------------------------------------------------------------------- with gradients

    def begin(self, step: Step) -> None:
        """Nothing is held between micro-steps, whatever became of the last one."""
        self.sweep()
        self._on_begin(step)

    def end(self, step: Step) -> None:
        """Give up what the backward pass still holds: blocks whose input needs no gradient, and all of it after an
        exception."""
        self.sweep()

    def sweep(self) -> None:
        """Give up everything."""
        self.done(0)
        while self._sampling:
            self._ring.release(self._sampling.pop())
        self._inside = 0

    def call(self, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        """The block, with its weights."""
        group = self._group_of.get(id(call.block))
        if group is None or not self._ring.serves(group):
            return proceed(call)
        self._inside += 1
        try:
            serial = call.notes.get(NAME)
            if serial is not None:
                return self.recompute(serial, group, call, proceed)
            self._serial += 1
            call.notes[NAME] = self._serial
            return self.forward(self._serial, group, call, proceed)
        finally:
            self._inside -= 1

    def forward(self, serial: int, group: Group, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        """The first time: the weights leave when the block is done, and autograd keeps nothing of them."""
        self._watch(call.args, serial)
        self._ring.acquire(group, backward=False)
        try:
            if call.checkpointed:  # the checkpoint has its own hooks on saved tensors, and saves none
                return proceed(call)
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: self.pack(tensor, serial), self.unpack):
                return proceed(call)
        finally:
            self._ring.release(group)

    def recompute(self, serial: int, group: Group, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        """The second time: the weights stay for the backward that follows. May end by torch's early-stop exception."""
        self.hold(serial, group)
        return proceed(call)

    def hold(self, serial: int, group: Group) -> None:
        """The backward of a call begins, or goes on; that of all later calls is over."""
        self.done(serial + 1)
        if serial not in self._held:
            self._ring.acquire(group, backward=True)
            self._held[serial] = group

    def done(self, serial: int) -> None:
        """The backward of this and all later calls is over."""
        for one in [held for held in self._held if held >= serial]:
            self._ring.release(self._held.pop(one))

    def _watch(self, args: tuple[Any, ...], serial: int) -> None:
        """Be told when the gradient of an argument is complete. (A leaf's would be, before the block is done.)"""
        for arg in args:
            if isinstance(arg, Tensor) and arg.grad_fn is not None:
                arg.register_hook(lambda _gradient: self.done(serial))
                return

    def pack(self, tensor: Tensor, serial: int) -> Any:
        """What autograd keeps of a tensor: all but streamed weights as they are (without their history, which autograd
        knows itself: a node that keeps its own output would keep itself alive)."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return tensor
        group = self._ring.owner(tensor)
        if group is None:
            return tensor.detach()
        return SavedWeight(
            serial, group, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
        )

    def unpack(self, kept: Any) -> Tensor:
        """The tensor again; a weight is brought back first, wherever in the ring it lands now."""
        if not isinstance(kept, SavedWeight):
            return kept
        self.hold(kept.serial, kept.group)
        buffer = self._ring.buffer(kept.group)
        return buffer.view(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)

    # ---------------------------------------------------------------------------------------- without gradients

    def attach(self, blocks: Mapping[int, nn.Module]) -> None:
        """Serve calls that come without the block runner: validation and rollouts, which have no gradients."""
        for block in blocks.values():
            self._handles.append(block.register_forward_pre_hook(self._before))
            self._handles.append(block.register_forward_hook(self._after, always_call=True))

    def detach(self) -> None:
        """Leave the blocks as they were."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, block: nn.Module, args: Any) -> None:
        group = self._group_of[id(block)]
        if self._inside or not self._ring.serves(group):
            return
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"group-offload: {group.name} was called with gradients outside of the block runner, so its weights "
                "are not on the device. Call the denoiser within a training step, or under torch.no_grad()."
            )
        self._ring.acquire(group, backward=False)
        self._sampling.append(group)

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._inside or not self._sampling or self._sampling[-1] is not self._group_of[id(block)]:
            return
        self._ring.release(self._sampling.pop())
