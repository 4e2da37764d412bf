"""Groups of weights as flat bytes.

A group is what is copied at once. Its parameters lie one behind the other in one flat uint8 tensor, whatever their
dtypes (modules kept in float32, fp8 payloads); a copy on the device gets them back as views. Every parameter keeps
size and strides, because other strides could choose other kernels and so other bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ALIGNMENT = 256
"""Bytes. What the CUDA allocator aligns to on its own is 512; kernels ask for 16 to 128."""
CPU_LINE = 64
"""Bytes. What torch aligns CPU tensors to, and the unit in which vectorised CPU kernels treat odd beginnings."""


@dataclass(frozen=True)
class Entry:
    """Where one parameter lies: `span` bytes from `offset`, seen with `size` and `stride` (in elements)."""

    name: str
    parameter: nn.Parameter
    offset: int
    span: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's values in a flat copy of its group."""
        return flat[self.offset : self.offset + self.span].view(self.dtype).as_strided(self.size, self.stride)


@dataclass(eq=False)
class Group:
    """Weights that travel together. `unit` is what becomes resident together; `rest` where the bytes stay."""

    name: str
    unit: int
    entries: tuple[Entry, ...]
    nbytes: int
    rest: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    resident: Tensor | None = None
    """The copy of a group that stays on the device."""

    def gathered(self) -> Tensor:
        """A flat copy of the parameters' present values, in main memory."""
        flat = torch.zeros(self.nbytes, dtype=torch.uint8)
        for entry in self.entries:
            data = entry.parameter.data
            count = entry.span // data.element_size()
            raw = data.as_strided((count,), (1,)).cpu().view(torch.uint8)
            flat[entry.offset : entry.offset + entry.span].copy_(raw)
        return flat

    def bind(self, flat: Tensor) -> None:
        """Let the parameters be views into `flat`."""
        for entry in self.entries:
            entry.parameter.data = entry.view(flat)


def lay_out(name: str, unit: int, parameters: Iterable[tuple[str, nn.Parameter]], *, device: str) -> Group:
    """A group of frozen, strided parameters for a kind of device.

    On a GPU a resident parameter would be aligned, so it is aligned here. On the CPU it would stay where it is, which
    in a memory-mapped checkpoint is any multiple of 8 bytes; matrix products sum in another order for an aligned
    matrix than for one that is not, so a copy keeps the address within a line.
    """
    entries, offset = [], 0
    for parameter_name, parameter in parameters:
        assert not parameter.requires_grad, f"{parameter_name} is trained and must stay on the device"
        data = parameter.data
        reach = sum((size - 1) * stride for size, stride in zip(data.shape, data.stride(), strict=True))
        span = (reach + 1) * data.element_size()
        line = data.data_ptr() % CPU_LINE if device == "cpu" else 0
        offset += line if line % data.element_size() == 0 else 0
        entries.append(Entry(parameter_name, parameter, offset, span, data.dtype, tuple(data.shape), data.stride()))
        offset = -(-(offset + span) // ALIGNMENT) * ALIGNMENT
    return Group(name, unit, tuple(entries), offset)
