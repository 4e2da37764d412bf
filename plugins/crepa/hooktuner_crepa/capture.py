"""Takes hidden tokens where a block hands them on, with the place of each token on the grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hooktuner.errors import ModelError
from hooktuner.family import Anatomy, Grid
from hooktuner.step import Step
from hooktuner.technique import BlockCall, BlockInterceptor
from torch import Tensor

from hooktuner_crepa import NAME


@dataclass(frozen=True)
class Capture:
    """Output of one block in one call of the denoiser.

    rows: which samples of the micro-batch. places_BK: the place of each token in raster order over frames, rows and
    columns; None: all tokens are there, in that order.
    """

    rows: Sequence[int]
    tokens_BKD: Tensor
    places_BK: Tensor | None
    grid: Grid


@dataclass
class StepNotes:
    """What CREPA leaves in `Step.notes`: the step's weight, and the captures of each block."""

    weight: float
    captures: dict[int, list[Capture]] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Observer(BlockInterceptor):
    """Captures the outputs of `blocks` in steps for which `decide` answers notes; never changes a call."""

    stage = "observe"

    def __init__(self, blocks: Sequence[int], decide: Callable[[Step], StepNotes | None]) -> None:
        self._blocks = frozenset(blocks)
        self._decide = decide

    def begin(self, step: Step) -> None:
        """Decide about the step."""
        notes = self._decide(step)
        if notes is not None:
            step.notes[NAME] = notes

    def end(self, step: Step) -> None:
        """Let go of hidden states."""
        step.notes.pop(NAME, None)

    def call(self, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        """Do the call; keep its output where the block is one of those wanted."""
        output = proceed(call)
        notes = call.step.notes.get(NAME)
        if notes is not None and call.index in self._blocks:
            notes.captures.setdefault(call.index, []).append(capture(call, output))
        return output


def capture(call: BlockCall, output: Any) -> Capture:
    """The tokens of a finished block call. Errors: `ModelError` for a block whose output is no tensor of tokens, or a
    grid that cannot be told."""
    rows = range(len(call.step.batch.index)) if call.step.rows is None else list(call.step.rows)
    if not isinstance(output, torch.Tensor) or output.ndim != 3 or output.shape[0] != len(rows):
        raise ModelError(
            f"crepa — block {call.index} does not answer one tensor of tokens (samples, tokens, width), so there is "
            "nothing to align. CREPA cannot be used with this model."
        )
    whole = call.args if call.kept_BK is None else call.first_args
    grid = None if whole is None else call.anatomy.read(whole).grid
    if whole is None or grid is None:
        raise ModelError(
            f"crepa — the token grid of block {call.index} is not known: the model's anatomy names none. CREPA cannot "
            "be used with this model."
        )
    if call.kept_BK is None:
        tokens_BND = call.anatomy.to_grid(output, whole).flatten(1, 2)
        return Capture(rows, tokens_BND, None, grid)
    return Capture(rows, output, raster_places(call.anatomy, whole, grid)[call.kept_BK], grid)


def raster_places(anatomy: Anatomy, args: tuple[Any, ...], grid: Grid) -> Tensor:
    """(N,): the place in raster order of each token of the sequence, which a model may order otherwise."""
    tokens = anatomy.read(args).tokens_BND
    number_BN1 = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)[..., None]
    order_N = anatomy.to_grid(number_BN1, args)[0].flatten()
    return torch.empty_like(order_N).scatter(0, order_N, torch.arange(len(order_N), device=order_N.device))
