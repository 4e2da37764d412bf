"""Groups of one layer each: a layer's weights are there while the layer computes, forward and backward.

A ring of a few layers is smaller than what one block saves for its backward, so autograd must not keep a layer's
weights at all. Each layer therefore runs as one autograd function: its forward keeps the inputs that its backward
needs, and its backward brings the weights again. For `nn.Linear`, by far the most of the bytes, the gradient of the
input is one matrix product with the weight, as autograd's own; any other layer is computed again there.

Works with and without gradient checkpointing, in validation and in rollouts alike: a layer needs nobody to tell it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hooktuner.step import Step
from hooktuner.technique import BlockInterceptor
from torch import Tensor, nn

from hooktuner_group_offload.layout import Group
from hooktuner_group_offload.ring import Ring


class LeafResidency(BlockInterceptor):
    """Only tells when a micro-step begins; the layers look after themselves."""

    stage = "reside"

    def __init__(self, on_begin: Callable[[Step], None]) -> None:
        self._on_begin = on_begin
        self._leaves: list[StreamedLeaf] = []

    def begin(self, step: Step) -> None:
        """See `Offload`."""
        self._on_begin(step)

    def sweep(self) -> None:
        """Nothing outlives a layer's call."""

    def attach(self, ring: Ring, leaves: list[tuple[Group, nn.Module]]) -> None:
        """Replace the `forward` of these modules (not of their classes)."""
        self._leaves = [StreamedLeaf(ring, group, module) for group, module in leaves]
        for leaf in self._leaves:
            leaf.attach()

    def detach(self) -> None:
        """Leave the modules as they were."""
        while self._leaves:
            self._leaves.pop().detach()


class StreamedLeaf:
    """The `forward` of a layer whose weights are streamed."""

    def __init__(self, ring: Ring, group: Group, module: nn.Module) -> None:
        self.ring = ring
        self.group = group
        self.module = module
        self.plain_linear = type(module) is nn.Linear and "forward" not in vars(module)
        self.forward: Callable[..., Any] = module.forward
        self._patched = vars(module).get("forward")

    def attach(self) -> None:
        """Take the place of the module's `forward`."""
        self.module.forward = self

    def detach(self) -> None:
        """Give it back."""
        if self._patched is None:
            del self.module.forward
        else:
            self.module.forward = self._patched

    @contextmanager
    def held(self, *, backward: bool) -> Iterator[None]:
        """The weights are on the device."""
        if not self.ring.serves(self.group):
            yield
            return
        self.ring.acquire(self.group, backward=backward)
        try:
            yield
        finally:
            self.ring.release(self.group)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        values = (*args, *kwargs.values())
        gradients = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
        if gradients and self.ring.serves(self.group):
            return _Leaf.apply(self, len(args), tuple(kwargs), *values)
        with self.held(backward=False):
            return self.forward(*args, **kwargs)


class _Leaf(torch.autograd.Function):
    """One call of a layer with frozen, streamed weights."""

    @staticmethod
    def forward(ctx: Any, leaf: StreamedLeaf, count: int, names: tuple[str, ...], *values: Any) -> Any:
        ctx.leaf, ctx.count, ctx.names = leaf, count, names
        kind = next(value.device.type for value in values if isinstance(value, Tensor))
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": False,
        }
        ctx.linear = leaf.plain_linear and len(values) == 1 and values[0].dim() >= 2
        if ctx.linear:
            ctx.input_dtype = values[0].dtype
        else:
            ctx.tensors = [position for position, value in enumerate(values) if isinstance(value, Tensor)]
            ctx.others = [None if isinstance(value, Tensor) else value for value in values]
            ctx.save_for_backward(*(values[position] for position in ctx.tensors))
        with leaf.held(backward=False):
            return leaf.forward(*values[:count], **dict(zip(names, values[count:], strict=True)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        if ctx.linear:
            assert gradients[0] is not None
            return None, None, None, _linear_backward(ctx, gradients[0])
        values = list(ctx.others)
        for position, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            values[position] = tensor.detach().requires_grad_(ctx.needs_input_grad[position + 3])
        with ctx.leaf.held(backward=True), torch.enable_grad(), torch.autocast(**ctx.autocast):
            output = ctx.leaf.forward(*values[: ctx.count], **dict(zip(ctx.names, values[ctx.count :], strict=True)))
            outputs = output if isinstance(output, tuple) else (output,)
            pairs = [
                (one, gradient)
                for one, gradient in zip(outputs, gradients, strict=True)
                if gradient is not None and isinstance(one, Tensor) and one.requires_grad
            ]
            wanted = [position for position in ctx.tensors if ctx.needs_input_grad[position + 3]]
            found = torch.autograd.grad(
                [one for one, _ in pairs],
                [values[position] for position in wanted],
                [gradient for _, gradient in pairs],
                allow_unused=True,
            )
        answers: list[Tensor | None] = [None] * len(values)
        for position, gradient in zip(wanted, found, strict=True):
            answers[position] = gradient
        return None, None, None, *answers


def _linear_backward(ctx: Any, gradient: Tensor) -> Tensor:
    """The gradient of a linear layer's input: the product that autograd makes, in the dtype of the forward."""
    with ctx.leaf.held(backward=True):
        weight = ctx.leaf.module.weight.detach().to(gradient.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1]).mm(weight)
    return rows.view(*gradient.shape[:-1], rows.shape[-1]).to(ctx.input_dtype)
