"""The block runner: the only door into a model's forward pass.

diffusers models call the function given to `enable_gradient_checkpointing(func)` as `func(block, *args)` for each
transformer block while gradients are on. Core passes one `BlockRunner`. It nests, outermost first:

    route ⊃ observe ⊃ recompute (gradient checkpointing) ⊃ reside ⊃ the block

What routes and observes therefore runs once per forward, never in the recomputation, so no random draw is repeated
and a captured tensor is captured once; what moves weights runs inside, because the recomputation needs the weights
again. Without gradients (validation, rollouts) the model calls its blocks directly and nothing here is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hooktuner.family import Anatomy
from hooktuner.step import Step
from hooktuner.technique import BlockCall, BlockInterceptor


@dataclass(frozen=True)
class Recompute:
    """The checkpoint policy: every `interval`-th block is recomputed in the backward pass.

    `dropout` says whether blocks draw random numbers, whose state must then be kept for the recomputation.
    """

    enabled: bool = True
    interval: int = 1
    dropout: bool = False

    def applies(self, position: int) -> bool:
        """Whether the block at `position` (in order of the first forward pass) is recomputed."""
        return self.enabled and position % self.interval == 0


class BlockRunner:
    """Runs every block call of a denoiser while gradients are on. `interceptors` come outermost first."""

    def __init__(
        self,
        denoiser: nn.Module,
        anatomy: Anatomy | None,
        interceptors: Sequence[BlockInterceptor],
        recompute: Recompute,
    ) -> None:
        self._denoiser = denoiser
        self._anatomy = anatomy
        self._interceptors = tuple(interceptors)
        self._outer = [one for one in interceptors if one.stage != "reside"]
        self._inner = [one for one in interceptors if one.stage == "reside"]
        self._recompute = recompute
        blocks = list(anatomy.blocks(denoiser)) if anatomy else []
        self._index = {id(block): index for index, block in enumerate(blocks)}
        self._position: dict[int, int] = {}
        self._step: Step | None = None
        self._first_args: tuple[Any, ...] | None = None

    def attach(self) -> None:
        """Become the denoiser's checkpointing function."""
        self._denoiser.enable_gradient_checkpointing(self)  # type: ignore[operator]

    def detach(self) -> None:
        """Leave the denoiser as it was."""
        self._denoiser.disable_gradient_checkpointing()  # type: ignore[operator]

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        """The forward and backward pass of one micro-step; interceptors are told its beginning and its end."""
        self._step = step
        begun: list[BlockInterceptor] = []
        try:
            for interceptor in self._interceptors:
                interceptor.begin(step)
                begun.append(interceptor)
            yield
        finally:
            self._step = self._first_args = None
            for interceptor in reversed(begun):
                interceptor.end(step)

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        """What the model calls in place of `block(*args)`."""
        if self._step is None or not self._interceptors or self._anatomy is None:
            return self._compute(block, None, args)
        index = self._index.get(id(block))
        if index == 0:
            self._first_args = args
        call = BlockCall(block, index, args, self._anatomy, self._step, first_args=self._first_args)
        if index is None:  # extra blocks have no tokens to route or observe
            return self._compute(block, call, args)
        return _nest(self._outer, lambda inner: self._compute(inner.block, inner, inner.args))(call)

    def _compute(self, block: nn.Module, call: BlockCall | None, args: tuple[Any, ...]) -> Any:
        position = self._position.setdefault(id(block), len(self._position))
        checkpointed = self._recompute.applies(position)
        function: Callable[..., Any] = block
        if call is not None and self._inner:
            function = self._resident(replace(call, checkpointed=checkpointed, notes={}))
        if not checkpointed:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=self._recompute.dropout)

    def _resident(self, call: BlockCall) -> Callable[..., Any]:
        run = _nest(self._inner, lambda inner: inner.block(*inner.args))

        def function(*args: Any) -> Any:
            return run(replace(call, args=args))

        return function


def _nest(
    interceptors: Sequence[BlockInterceptor], innermost: Callable[[BlockCall], Any]
) -> Callable[[BlockCall], Any]:
    """One function that passes a call through all interceptors, the first outermost."""
    proceed = innermost
    for interceptor in reversed(interceptors):
        proceed = _around(interceptor, proceed)
    return proceed


def _around(interceptor: BlockInterceptor, proceed: Callable[[BlockCall], Any]) -> Callable[[BlockCall], Any]:
    return lambda call: interceptor.call(call, proceed)
