"""Which tokens are kept: counts, order, uniformity, tokens that must stay, tiles, sub-grids."""

from __future__ import annotations

import pytest
import torch
from hooktuner.errors import ModelError
from hooktuner.family import Grid, Keepable
from hooktuner.randomness import generator
from hooktuner_tread.choice import choose, dropped

GRID = Grid(5, 6, 8)
TOKENS = 240


def draws(count, first=0):
    return [generator(1, "test", number) for number in range(first, first + count)]


def frequencies(keepable, ratio, samples=4000, tokens=TOKENS, grid=GRID):
    """How often each token is kept, and how many are."""
    kept = choose(keepable, tokens, grid, ratio, draws(samples)).index_BK
    return torch.bincount(kept.flatten(), minlength=tokens) / samples, kept


@pytest.mark.parametrize(
    ("ratio", "count", "wanted"),
    [
        (0.5, 10, 5),
        (0.5, 11, 5),
        (0.29, 100, 29),
        (0.0, 7, 0),
        (0.7, 10, 7),
        (0.99, 2, 1),
        (0.999999, 3, 2),
        (0.9, 1, 0),
    ],
)
def test_how_many_are_dropped(ratio, count, wanted):
    assert dropped(ratio, count) == wanted


def test_any_tokens_uniformly():
    share, kept = frequencies(Keepable("any"), 0.3)
    assert kept.shape == (4000, 168)
    assert (kept.diff(dim=1) > 0).all()
    error = (share - 0.7) / (0.7 * 0.3 / 4000) ** 0.5
    assert error.abs().max() < 4.5, "every position is equally likely"
    assert 0.7 < error.std() < 1.3, "and as random as draws without replacement are"
    both = torch.zeros(4000, TOKENS).scatter(1, kept, 1.0)
    together = (both.T @ both / 4000)[torch.triu(torch.ones(TOKENS, TOKENS), 1).bool()]
    pair = 168 * 167 / (240 * 239)
    assert (together - pair).abs().max() < 5.5 * (pair * (1 - pair) / 4000) ** 0.5, "also in pairs"


def test_samples_are_drawn_for_themselves():
    together = choose(Keepable("any"), 50, None, 0.5, draws(3)).index_BK
    for row in range(3):
        assert torch.equal(choose(Keepable("any"), 50, None, 0.5, draws(1, row)).index_BK[0], together[row])


def test_tokens_that_must_be_kept():
    must = torch.zeros(2, 40, dtype=torch.bool)
    must[0, 10:15] = True
    kept = choose(Keepable("any", 1, must), 40, None, 0.5, draws(2)).index_BK
    assert kept.shape == (2, 20)
    assert set(range(10, 15)) <= set(kept[0].tolist())
    share, many = frequencies(Keepable("any", 1, must[:1]), 0.5, tokens=40, grid=None)
    assert (many.diff(dim=1) > 0).all()
    assert (share[10:15] == 1).all()
    rest = torch.cat([share[:10], share[15:]])
    assert ((rest - 15 / 35) / (15 / 35 * 20 / 35 / 4000) ** 0.5).abs().max() < 4.5, "the others stay uniform"


def test_more_must_be_kept_than_the_ratio_leaves():
    must = torch.zeros(2, 40, dtype=torch.bool)
    must[0, 3:35] = True
    kept = choose(Keepable("any", 1, must), 40, None, 0.9, draws(2)).index_BK
    assert kept.shape == (2, 32)
    assert kept[0].tolist() == list(range(3, 35))
    assert len(set(kept[1].tolist())) == 32
    everything = choose(Keepable("any", 1, torch.ones(1, 40, dtype=torch.bool)), 40, None, 0.9, draws(2)).index_BK
    assert torch.equal(everything, torch.arange(40).expand(2, -1))


def test_tiles():
    must = torch.zeros(1, TOKENS, dtype=torch.bool)
    must[0, 41] = True
    share, kept = frequencies(Keepable("tiles", 8, must), 0.5)
    assert kept.shape == (4000, 15 * 8)
    assert torch.equal(kept.reshape(4000, 15, 8) % 8, torch.arange(8).expand(4000, 15, -1))
    assert (kept.diff(dim=1) > 0).all()
    tiles = share.reshape(30, 8)
    assert (tiles == tiles[:, :1]).all()
    assert tiles[5, 0] == 1, "a tile with one token that must be kept is kept"
    others = torch.cat([tiles[:5, 0], tiles[6:, 0]])
    assert ((others - 14 / 29) / (14 / 29 * 15 / 29 / 4000) ** 0.5).abs().max() < 4.5


def axes(index, grid):
    return index // (grid.rows * grid.columns), index // grid.columns % grid.rows, index % grid.columns


@pytest.mark.parametrize(
    ("ratio", "rows", "columns"), [(0.5, 4, 6), (0.25, 5, 7), (0.75, 3, 4), (0.99, 1, 1), (0, 6, 8)]
)
def test_sub_grids_are_windows_that_wrap_around(ratio, rows, columns):
    answer = choose(Keepable("sub_grid"), TOKENS, GRID, ratio, draws(200))
    assert answer.grid == Grid(5, rows, columns)
    assert answer.index_BK.shape == (200, 5 * rows * columns)
    assert (answer.index_BK.diff(dim=1) > 0).all() or answer.index_BK.shape[1] == 1
    starts = set()
    for index in answer.index_BK:
        frames, kept_rows, kept_columns = (sorted(set(one.tolist())) for one in axes(index, GRID))
        assert (len(frames), len(kept_rows), len(kept_columns)) == (5, rows, columns), "a product of the three"
        for kept, size in ((kept_rows, 6), (kept_columns, 8)):
            gaps = [(following - one) % size for one, following in zip(kept, kept[1:] + kept[:1], strict=True)]
            assert sum(gap != 1 for gap in gaps) <= 1, "one run, seen as a circle"
        starts.add((tuple(kept_rows), tuple(kept_columns)))
    assert len(starts) > 10 or ratio == 0


def test_sub_grids_keep_every_position_equally_often():
    share, _ = frequencies(Keepable("sub_grid"), 0.5)
    wanted = 4 * 6 / 48
    assert ((share - wanted) / (wanted * (1 - wanted) / 4000) ** 0.5).abs().max() < 4.5


def test_sub_grids_with_tokens_that_must_be_kept_drop_frames():
    must = torch.zeros(2, TOKENS, dtype=torch.bool)
    must[0, :48] = True
    answer = choose(Keepable("sub_grid", 1, must), TOKENS, GRID, 0.5, draws(2))
    assert answer.grid == Grid(3, 6, 8)
    for row, index in enumerate(answer.index_BK):
        assert (index.diff() > 0).all()
        frames = set(axes(index, GRID)[0].tolist())
        assert len(frames) == 3
        assert row == 1 or 0 in frames
    share, _ = frequencies(Keepable("sub_grid", 1, must[:1]), 0.5)
    frames = share.reshape(5, 48)
    assert (frames == frames[:, :1]).all()
    assert frames[0, 0] == 1
    assert ((frames[1:, 0] - 0.5) / (0.25 / 4000) ** 0.5).abs().max() < 4.5
    whole = choose(Keepable("sub_grid", 1, torch.ones(1, TOKENS, dtype=torch.bool)), TOKENS, GRID, 0.5, draws(1))
    assert whole.grid == GRID
    assert torch.equal(whole.index_BK[0], torch.arange(TOKENS))


def test_a_mask_without_tokens_leaves_rows_and_columns():
    none = torch.zeros(1, TOKENS, dtype=torch.bool)
    answer = choose(Keepable("sub_grid", 1, none), TOKENS, GRID, 0.5, draws(2))
    assert answer.grid == Grid(5, 4, 6)


@pytest.mark.parametrize(
    ("keepable", "tokens", "grid", "text"),
    [
        (Keepable("none"), 240, GRID, "tread — the blocks of this clip cannot do without any token. Train without"),
        (Keepable("tiles", 64), 240, GRID, "tread — 240 tokens are not whole tiles of 64"),
        (Keepable("sub_grid"), 240, None, "its blocks need a grid, and gives None for 240 tokens"),
        (Keepable("sub_grid"), 239, GRID, r"gives Grid\(frames=5, rows=6, columns=8\) for 239 tokens"),
    ],
)
def test_anatomies_that_contradict_themselves(keepable, tokens, grid, text):
    with pytest.raises(ModelError, match=text):
        choose(keepable, tokens, grid, 0.5, draws(1))
