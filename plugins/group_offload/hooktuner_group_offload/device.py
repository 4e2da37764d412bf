"""The two devices that a ring of buffers can be on: CUDA, and its simulation in main memory.

The simulation runs the same scheduler with buffers that are separate CPU tensors, and makes every mistake visible: a
released buffer is filled with NaN, so whatever still reads it gives NaN instead of yesterday's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hooktuner_group_offload.layout import Entry, Group
from hooktuner_group_offload.meter import Meter

POISON = 0xFF
"""Bytes of all ones are a NaN in float32, float16, bfloat16 and the fp8 formats."""


@dataclass(eq=False)
class Slot:
    """One buffer of the ring. `users`: how many hold it; contents stay valid without users until it is filled."""

    buffer: Tensor
    group: Group | None = None
    users: int = 0
    used: int = 0
    """When it was last held, on the ring's own clock."""
    ready: Any = None
    free: Any = None
    staging: Tensor | None = None
    waited: bool = True


class Device(Protocol):
    """What the ring needs of a device."""

    def allocate(self, nbytes: int) -> Tensor:
        """A flat uint8 buffer."""
        ...

    def fill(self, slot: Slot, group: Group) -> None:
        """Begin to copy a group into a slot that has no users."""
        ...

    def hold(self, slot: Slot) -> None:
        """The computation that is enqueued from here on may use the slot's weights."""
        ...

    def release(self, slot: Slot) -> None:
        """The computation that was enqueued until here was the last to use the slot."""
        ...

    def absent(self, group: Group) -> None:
        """Let the parameters of a group that is not on the device be what they shall be then."""
        ...

    def copy(self, group: Group) -> Tensor:
        """A copy of a group for good (a resident block)."""
        ...


class SimulatedDevice:
    """Main memory as the device. `poison_absent`: weights that are not in a buffer are NaN too (for tests), as on
    CUDA they are on the wrong device; else they are the weights at rest, which saving needs."""

    def __init__(self, meter: Meter, *, poison_absent: bool = False) -> None:
        self._meter = meter
        self._poison_absent = poison_absent

    def allocate(self, nbytes: int) -> Tensor:
        """A poisoned buffer."""
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def fill(self, slot: Slot, group: Group) -> None:
        """Copy; the rest of the buffer is poison."""
        slot.buffer[: group.nbytes].copy_(group.rest)
        self._meter.copied(group.nbytes)

    def hold(self, slot: Slot) -> None:
        """Take the poison away, where the contents of a released slot are used again (on CUDA they are still there,
        so this is no copy)."""
        if slot.users == 0:
            assert slot.group is not None
            slot.buffer[: slot.group.nbytes].copy_(slot.group.rest)

    def release(self, slot: Slot) -> None:
        """Poison."""
        slot.buffer.fill_(POISON)

    def absent(self, group: Group) -> None:
        """The weights at rest, or NaN."""
        group.bind(group.rest)
        if self._poison_absent:
            for entry in group.entries:
                entry.parameter.data = _poisoned(entry)

    def copy(self, group: Group) -> Tensor:
        """A copy."""
        self._meter.copied(group.nbytes)
        return group.rest.clone()


def _poisoned(entry: Entry) -> Tensor:
    return torch.full((entry.span,), POISON, dtype=torch.uint8).view(entry.dtype).as_strided(entry.size, entry.stride)


class CudaDevice:
    """A GPU. Copies run on a stream of their own (`ahead`), or on that of the computation.

    Events order both ways: a copy starts when the last kernel that used the slot is done, and the computation goes
    on when the copy is done; the host waits for neither.
    """

    def __init__(self, device: torch.device, meter: Meter, *, ahead: bool) -> None:
        self._device = device
        self._meter = meter
        self._stream = torch.cuda.Stream(device) if ahead else None

    def allocate(self, nbytes: int) -> Tensor:
        """A buffer of the computation's stream, whose pending work a first copy has to wait for."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def fill(self, slot: Slot, group: Group) -> None:
        """Enqueue the copy; from memory that is not page-locked by way of a page-locked buffer."""
        computing = torch.cuda.current_stream(self._device)
        stream = self._stream or computing
        if slot.free is None:
            slot.free = torch.cuda.Event()
            slot.free.record(computing)
        source = group.rest
        if not source.is_pinned():
            if slot.ready is not None:
                slot.ready.synchronize()  # the staging buffer is still being read
            if slot.staging is None:
                slot.staging = torch.empty(slot.buffer.numel(), dtype=torch.uint8, pin_memory=True)
            source = slot.staging[: group.nbytes].copy_(source)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            stream.wait_event(slot.free)
            start.record(stream)
            slot.buffer[: group.nbytes].copy_(source, non_blocking=True)
            end.record(stream)
        slot.ready, slot.waited = end, False
        self._meter.copied(group.nbytes, (start, end))
        if self._stream is None:
            self._meter.stalled((start, end))

    def hold(self, slot: Slot) -> None:
        """Let the computation wait for the copy, and measure how long it does."""
        if slot.ready is None:
            return
        computing = torch.cuda.current_stream(self._device)
        if slot.waited or self._stream is None:
            computing.wait_event(slot.ready)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(computing)
        computing.wait_event(slot.ready)
        end.record(computing)
        slot.waited = True
        self._meter.stalled((start, end))

    def release(self, slot: Slot) -> None:
        """Note where the computation stands."""
        slot.free = torch.cuda.Event()
        slot.free.record(torch.cuda.current_stream(self._device))

    def absent(self, group: Group) -> None:
        """The weights at rest, in main memory: saving works, computing with them by mistake is an error."""
        group.bind(group.rest)

    def copy(self, group: Group) -> Tensor:
        """A copy on the computation's stream."""
        return group.rest.to(self._device, non_blocking=True)
