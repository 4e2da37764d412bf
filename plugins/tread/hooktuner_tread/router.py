"""The router: dropped tokens leave before a route and return behind it with the value they had.

Between, every block is given the kept tokens and whatever goes with them token by token. The choice is a function of
the seed, the sample's number in the run and the route, so nothing has to be saved to resume, and interceptors run
outside the recomputed region, so nothing is drawn twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hooktuner.errors import ModelError, PluginError
from hooktuner.family import BlockTokens, Grid
from hooktuner.randomness import generator
from hooktuner.step import Step
from hooktuner.technique import BlockCall, BlockInterceptor, Stage
from torch import Tensor

from hooktuner_tread import NAME
from hooktuner_tread.choice import choose
from hooktuner_tread.routes import Span


@dataclass
class _Open:
    """A route under way in one forward pass."""

    span: Span
    next: int
    saved_BND: Tensor
    index_BK: Tensor
    grid: Grid | None
    sides: list[tuple[Tensor, int, Tensor]] = field(default_factory=list)
    """(whole side tensor, token axis, gathered): most models hand every block the same tensors."""

    def side(self, tensor: Tensor, axis: int) -> Tensor:
        """The rows of a side tensor that belong to the kept tokens."""
        for whole, other_axis, gathered in self.sides:
            if axis == other_axis and _same(whole, tensor):
                return gathered
        gathered = take(tensor, axis, self.index_BK)
        self.sides.append((tensor, axis, gathered))
        return gathered


class Router(BlockInterceptor):
    """Routes tokens around stretches of blocks while gradients are on.

    spans: routes that do not overlap. share: the share of the run in which routing is on. total_steps: the length of
    the run; where it is None it must be set before the first step.
    """

    stage: Stage = "route"

    def __init__(self, spans: Sequence[Span], seed: int, share: float, total_steps: int | None) -> None:
        self.total_steps = total_steps
        self._span_of = {index: span for span in spans for index in range(span.start, span.end + 1)}
        self._seed = seed
        self._share = share
        self._open: _Open | None = None

    @property
    def routed_steps(self) -> int:
        """Routing is on in this many steps from the start of the run: those that begin before `share` of it."""
        if self.total_steps is None:
            raise PluginError(f"{NAME} — the length of the run is not known: the event TrainingStarted did not come.")
        return math.ceil(self._share * self.total_steps - 1e-6)

    def begin(self, step: Step) -> None:
        """Nothing of an earlier forward pass is left, also not after an exception in it."""
        self._open = None

    def end(self, step: Step) -> None:
        """Let go of what an exception left."""
        self._open = None

    def call(self, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        """Route the call, if its block is in a route and routing is on."""
        span = None if call.index is None else self._span_of.get(call.index)
        if span is None or call.step.number > self.routed_steps:
            return proceed(call)
        tokens = call.anatomy.read(call.args)
        if call.index == span.start:
            route = self._open = self._start(span, call, tokens)
            kept_BKD = take(tokens.tokens_BND, 1, route.index_BK)
        else:
            route, kept_BKD = self._under_way(span, call), tokens.tokens_BND
        sides = tuple((route.side(tensor, axis), axis) for tensor, axis in tokens.sides)
        args = call.anatomy.write(call.args, BlockTokens(kept_BKD, sides, route.grid), route.index_BK)
        out_BKD = proceed(replace(call, args=args, kept_BK=route.index_BK))
        if not isinstance(out_BKD, Tensor) or out_BKD.shape[:2] != route.index_BK.shape:
            raise ModelError(
                f"{NAME} — block {call.index} was given {tuple(kept_BKD.shape)} tokens and did not return as many. "
                "Report this to the authors of the family: its blocks cannot be routed."
            )
        route.next += 1
        if call.index != span.end:
            return out_BKD
        self._open = None
        return put_back(route.saved_BND, out_BKD, route.index_BK)

    def _start(self, span: Span, call: BlockCall, tokens: BlockTokens) -> _Open:
        if call.kept_BK is not None:
            raise PluginError(f"{NAME} — another plugin has routed block {call.index} already. Remove one of the two.")
        step = call.step
        batch, count, _ = tokens.tokens_BND.shape
        rows = range(len(step.batch.index)) if step.rows is None else step.rows
        if len(rows) != batch:
            raise ModelError(
                f"{NAME} — a block was called with {batch} samples, and the step under way has {len(rows)}. Report "
                "this to the authors of the family: it must set step.rows when it splits a batch."
            )
        draws = [generator(self._seed, NAME, step.batch.index[row], span.number) for row in rows]
        keepable = call.anatomy.keepable(call.args, step)
        kept = choose(keepable, count, tokens.grid, span.ratio, draws)
        index_BK, device = kept.index_BK, tokens.tokens_BND.device
        if device.type == "cuda":  # copies from pinned memory do not wait for the device
            index_BK = index_BK.pin_memory()
        return _Open(span, span.start, tokens.tokens_BND, index_BK.to(device, non_blocking=True), kept.grid)

    def _under_way(self, span: Span, call: BlockCall) -> _Open:
        route = self._open
        if route is None or route.span is not span or route.next != call.index:
            due = f"block {span.start if route is None else route.next}"
            raise ModelError(
                f"tread_config.routes[{span.number}] — the model called block {call.index} where {due} was due, so its "
                "tokens cannot be followed. Let no route contain blocks that the model skips or repeats."
            )
        return route


def take(tensor: Tensor, axis: int, index_BK: Tensor) -> Tensor:
    """The entries `index_BK` of a tensor along its token axis, per sample; batch axis 0 of size B or 1."""
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = index_BK.shape
    return torch.take_along_dim(tensor, index_BK.reshape(shape), dim=axis)


def put_back(whole_BND: Tensor, kept_BKD: Tensor, index_BK: Tensor) -> Tensor:
    """The whole sequence with the kept tokens in their places, in the dtype in which the blocks returned them."""
    index_BKD = index_BK[:, :, None].expand(-1, -1, kept_BKD.shape[2])
    return whole_BND.to(kept_BKD.dtype).scatter(1, index_BKD, kept_BKD)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, unchanged; the first is kept alive, so memory is not reused."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one._version == other._version
        and one.requires_grad == other.requires_grad
    )
