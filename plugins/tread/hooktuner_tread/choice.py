"""Which tokens a route keeps: uniformly random, in the units that the model's blocks can be given.

Everything here is on the CPU, so that the choice is the same on every device. Shape suffixes as in
`hooktuner.family`, and U for units (tokens or tiles).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hooktuner.errors import ModelError
from hooktuner.family import Grid, Keepable
from torch import Generator, Tensor


@dataclass(frozen=True)
class Kept:
    """index_BK: int64, sorted, without repetition. grid: what remains as a grid, where it is one (`sub_grid`)."""

    index_BK: Tensor
    grid: Grid | None = None


def dropped(ratio: float, count: int) -> int:
    """How many of `count` a route with this ratio drops: rounded down, less than all."""
    return min(math.floor(ratio * count + 1e-6), count - 1)


def choose(keepable: Keepable, tokens: int, grid: Grid | None, ratio: float, draws: Sequence[Generator]) -> Kept:
    """The kept tokens of each sample; one generator per sample.

    Every sample keeps equally many. Where a sample has more tokens that must be kept than the ratio leaves, all
    samples keep that many. Errors: `ModelError` where the family's anatomy contradicts itself.
    """
    must_BN = None
    if keepable.must_keep_BN is not None:
        must_BN = keepable.must_keep_BN.cpu().expand(len(draws), -1)
    if keepable.unit == "sub_grid":
        if grid is None or grid.frames * grid.rows * grid.columns != tokens:
            raise ModelError(
                f"tread — the family says that its blocks need a grid, and gives {grid} for {tokens} tokens. "
                "Report this to the authors of the family."
            )
        return _sub_grid(grid, must_BN, ratio, draws)
    if keepable.unit == "none":
        raise ModelError("tread — the blocks of this clip cannot do without any token. Train without tread_config.")
    tile = keepable.tile if keepable.unit == "tiles" else 1
    if tokens % tile:
        raise ModelError(
            f"tread — {tokens} tokens are not whole tiles of {tile}. Report this to the authors of the family."
        )
    return Kept(_units(tokens // tile, tile, must_BN, ratio, draws))


def _units(units: int, tile: int, must_BN: Tensor | None, ratio: float, draws: Sequence[Generator]) -> Tensor:
    count = units - dropped(ratio, units)
    must_BU = None
    if must_BN is not None:
        must_BU = must_BN.unflatten(1, (units, tile)).any(-1)
        count = max(count, int(must_BU.sum(-1).max()))
    rows = []
    for row, draw in enumerate(draws):
        order = torch.randperm(units, generator=draw)
        if must_BU is not None:  # those that must be kept come first; the others stay in their random order
            must = must_BU[row][order]
            order = torch.cat([order[must], order[~must]])
        rows.append(order[:count].sort().values)
    index_BU = torch.stack(rows)
    if tile == 1:
        return index_BU
    return (index_BU[:, :, None] * tile + torch.arange(tile)).flatten(1)


# ---------------------------------------------------------------------------------------------------- sub-grids


def _sub_grid(grid: Grid, must_BN: Tensor | None, ratio: float, draws: Sequence[Generator]) -> Kept:
    """A window of rows and columns that wraps around the edges, in all frames.

    Wrapping makes every position equally likely to be kept, with one seam each way, so that nearly all neighbours of
    kept tokens are kept. Where tokens must be kept (a first frame needs all rows and columns), whole frames are
    dropped instead.
    """
    shape = (grid.frames, grid.rows, grid.columns)
    if must_BN is None or not must_BN.any():
        rows, columns = _window_size(grid, 1 - ratio)
        kept = Grid(grid.frames, rows, columns)
        chosen = [
            (torch.arange(grid.frames), _window(grid.rows, rows, draw), _window(grid.columns, columns, draw))
            for draw in draws
        ]
    else:
        must_BF = must_BN.unflatten(1, shape).flatten(2).any(-1)
        count = max(grid.frames - dropped(ratio, grid.frames), int(must_BF.sum(-1).max()))
        kept = Grid(count, grid.rows, grid.columns)
        chosen = [
            (_window(grid.frames, count, draw, must_F), torch.arange(grid.rows), torch.arange(grid.columns))
            for draw, must_F in zip(draws, must_BF, strict=True)
        ]
    index = torch.arange(grid.frames * grid.rows * grid.columns).reshape(shape)
    rows_K = [index[frames][:, rows][:, :, columns].flatten() for frames, rows, columns in chosen]
    return Kept(torch.stack(rows_K), kept)


def _window_size(grid: Grid, share: float) -> tuple[int, int]:
    """Rows and columns whose product is near `share` of the grid's, shrunk alike."""
    rows = max(1, round(grid.rows * math.sqrt(share)))
    columns = min(grid.columns, max(1, round(grid.rows * grid.columns * share / rows)))
    return rows, columns


def _window(size: int, count: int, draw: Generator, must: Tensor | None = None) -> Tensor:
    """`count` sorted positions of `size`: those that must be there, and a run of the others that wraps around."""
    forced = torch.empty(0, dtype=torch.long) if must is None else must.nonzero()[:, 0]
    free = torch.arange(size) if must is None else (~must).nonzero()[:, 0]
    if len(free) == 0:
        return forced
    start = int(torch.randint(len(free), (), generator=draw))
    run = free[(start + torch.arange(count - len(forced))) % len(free)]
    return torch.cat([forced, run]).sort().values
