"""Routes on a real model: block numbers resolved, and everything refused that the model cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from hooktuner.errors import ModelError, Problem

from hooktuner_tread.options import Route, TreadConfig, overlap


@dataclass(frozen=True)
class Span:
    """A route with block numbers from 0, `end` inclusive. `number`: its position in the config."""

    number: int
    start: int
    end: int
    ratio: float


def resolve(config: TreadConfig, blocks: int, model: str) -> tuple[Span, ...]:
    """The routes of a model with so many blocks. model: how messages name it.

    Errors: `ModelError` with one line per problem, each with its JSON path.
    """
    problems: list[Problem] = []
    spans: list[Span] = []
    for number, route in enumerate(config.routes):
        found = _problem(route, blocks, f"tread_config.routes[{number}]", model)
        if found is not None:
            problems.append(found)
            continue
        start, end = _from_zero(route.start_layer_idx, blocks), _from_zero(route.end_layer_idx, blocks)
        spans.append(Span(number, start, end, route.selection_ratio))
    for one, two in combinations(spans, 2):
        if one.start <= two.end and two.start <= one.end:
            why = overlap(one.number, (one.start, one.end), two.number, (two.start, two.end))
            problems.append(Problem("tread_config", f"on the {blocks} blocks of {model}, {why}"))
    if problems:
        raise ModelError("\n".join(map(str, problems)))
    return tuple(sorted(spans, key=lambda span: span.start))


def _from_zero(index: int, blocks: int) -> int:
    return index + blocks if index < 0 else index


def _problem(route: Route, blocks: int, path: str, model: str) -> Problem | None:
    for key in ("start_layer_idx", "end_layer_idx"):
        index = getattr(route, key)
        if not -blocks <= index < blocks:
            return Problem(
                f"{path}.{key}",
                f"there is no block {index}: {model} has {blocks} blocks",
                f"Choose from 0 to {blocks - 1}, or from -1 to -{blocks} counted from the end.",
            )
    start, end = _from_zero(route.start_layer_idx, blocks), _from_zero(route.end_layer_idx, blocks)
    if start > end:
        return Problem(
            path,
            f"with the {blocks} blocks of {model} the route starts at block {start}, behind its end {end} (inclusive)",
            "Lower start_layer_idx or raise end_layer_idx.",
        )
    if end == blocks - 1:
        return Problem(
            f"{path}.end_layer_idx",
            f"block {end} is the last one of {model}: dropped tokens would leave the model straight from the start of "
            "the route",
            f"End the route at block {blocks - 2} or earlier.",
        )
    return None
