"""The loss against a float64 reference, and its invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hooktuner.family import Grid
from hooktuner_crepa.loss import Neighbours, alignment, backbone_teacher, encoder_teacher
from torch.nn import functional as F

GRID = Grid(5, 3, 4)
TOKENS = GRID.frames * GRID.rows * GRID.columns


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data(batch=2, width=6, patches=(7, 5)):
    return draw(batch, TOKENS, width, seed=1), draw(batch, GRID.frames, *patches, width, seed=2)


def total(student, features, *, d=1, tau=1.0, cumulative=False, grid=GRID, **more):
    weights = Neighbours(d, tau, cumulative).weights(grid.frames)
    return alignment(student, encoder_teacher(features, grid), weights, **more).total_B


CASES = [
    {},
    {"d": 0},
    {"d": 2, "tau": 0.7},
    {"d": 4},
    {"d": 5},
    {"d": 3, "cumulative": True},
    {"d": 9, "tau": 2.0, "cumulative": True},
    {"normalize_sum": True},
    {"d": 2, "cumulative": True, "normalize_sum": True},
    {"mean_over_frames": False},
    {"spatial": False},
    {"spatial": False, "normalize_sum": True, "d": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("patches", [(7, 5), (2, 9), (3, 4)], ids=str)
def test_it_equals_the_float64_reference(expected, case, patches):
    student, features = data(patches=patches)
    found = total(student, features, **case)
    wanted = expected(student, features, (5, 3, 4), **case)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("normalize_sum", [True, False])
def test_kept_tokens_and_left_out_frames_equal_the_reference(expected, spatial, normalize_sum):
    student, features = data()
    kept = torch.stack([torch.randperm(TOKENS, generator=torch.Generator().manual_seed(b))[:17] for b in range(2)])
    kept[1] = torch.arange(24, 41)  # sample 1 has nothing of frames 0, 1 and 4
    kept = kept.sort(1).values
    counted = torch.tensor([[False, True, True, True, True], [False, True, True, True, False]])
    case = {"spatial": spatial, "normalize_sum": normalize_sum}
    found = total(student[:, :17], features, places_BK=kept, counted_BF=counted, **case)
    wanted = expected(student[:, :17], features, (5, 3, 4), kept=kept, counted=counted, **case)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-6)


def test_all_tokens_named_one_by_one_are_all_tokens():
    student, features = data()
    places = torch.arange(TOKENS).expand(2, -1)
    assert torch.allclose(total(student, features), total(student, features, places_BK=places), atol=1e-6)


def test_weights_at_the_borders_and_beyond():
    near = math.exp(-1 / 2)
    weights = Neighbours(1, 2.0).weights(3)
    wanted = torch.tensor([[1, near, 0], [near, 1, near], [0, near, 1]])
    assert torch.allclose(weights, wanted)
    for distance in (3, 4, 0):
        assert torch.equal(Neighbours(distance, 2.0).weights(3), torch.eye(3))
    assert torch.equal(Neighbours(1, 1.0).weights(1), torch.eye(1))
    assert torch.equal(Neighbours(1, 1.0, True).weights(4), Neighbours(1, 1.0).weights(4))
    assert torch.equal(Neighbours(2, 1.0).weights(4)[0] > 0, torch.tensor([True, False, True, False]))
    assert torch.equal(Neighbours(2, 1.0, True).weights(4)[0] > 0, torch.tensor([True, True, True, False]))


def test_a_static_clip_reaches_the_bound():
    frame = draw(1, 1, 3, 4, 6)
    features = frame.expand(1, 5, 3, 4, 6)
    student = features.reshape(1, TOKENS, 6)
    bound = 1 + 2 * (5 - 1) / 5 * math.exp(-1)
    assert total(student, features).item() == pytest.approx(bound, abs=1e-5)
    assert bound == pytest.approx(1.5886, abs=1e-4)
    assert total(student, features, normalize_sum=True).item() == pytest.approx(1, abs=1e-5)


def test_scale_of_either_side_time_reversal_and_order_of_samples_do_not_matter():
    student, features = data(patches=(3, 4))
    plain = total(student, features)
    scale = draw(2, TOKENS, 1, seed=5).exp()
    assert torch.allclose(total(student * scale, features), plain, atol=1e-6)
    assert torch.allclose(total(student, features * draw(2, 5, 3, 4, 1, seed=6).exp()), plain, atol=1e-6)
    backwards = student.unflatten(1, (5, 12)).flip(1).flatten(1, 2)
    assert torch.allclose(total(backwards, features.flip(1)), plain, atol=1e-6)
    assert torch.allclose(total(student.flip(0), features.flip(0)), plain.flip(0), atol=1e-6)


def test_the_best_student_is_the_blend_of_the_neighbours():
    _, features = data(patches=(3, 4))
    teacher = encoder_teacher(features, GRID)
    weights = Neighbours().weights(5)
    blend = torch.einsum("fk,bkpe->bfpe", weights, teacher.unit_BFPE)
    best = alignment(blend.flatten(1, 2), teacher, weights).total_B
    equal = alignment(teacher.unit_BFPE.flatten(1, 2), teacher, weights).total_B
    assert (best > equal + 0.01).all()
    for seed in range(3):
        other = blend + 0.1 * draw(*blend.shape, seed=seed)
        assert (alignment(other.flatten(1, 2), teacher, weights).total_B < best).all()


def test_edge_frames_pull_less_than_those_within_by_the_ratio_of_weights():
    features = draw(1, 1, 3, 4, 6).expand(1, 5, 3, 4, 6)
    student = draw(1, 12, 6, seed=3).repeat(1, 5, 1).requires_grad_()
    total(student, features).sum().backward()
    norms = student.grad.unflatten(1, (5, 12)).norm(dim=-1)[0]
    assert torch.allclose(norms[2] / norms[0], torch.full((12,), (1 + 2 * math.exp(-1)) / (1 + math.exp(-1))))


@pytest.mark.parametrize("grid", [Grid(2, 30, 52), Grid(2, 32, 48), Grid(1, 44, 80), Grid(3, 5, 3)], ids=str)
def test_every_student_token_gets_a_gradient_and_the_teacher_none(grid):
    features = draw(1, grid.frames, 9, 16, 8).requires_grad_()
    student = draw(1, grid.frames * grid.rows * grid.columns, 8, seed=4).requires_grad_()
    teacher = encoder_teacher(features.detach(), grid)
    alignment(student, teacher, Neighbours().weights(grid.frames)).total_B.sum().backward()
    norms = student.grad.norm(dim=-1)
    assert (norms > 1e-4 * norms.median()).all()
    assert features.grad is None


@pytest.mark.parametrize("grid", [Grid(2, 30, 52), Grid(2, 32, 48), Grid(1, 44, 80)], ids=str)
@pytest.mark.parametrize("patches", [(37, 37), (28, 49), (16, 16)], ids=str)
def test_a_teacher_that_knows_its_coordinates_gives_them_to_the_right_tokens(grid, patches):
    row, column = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in patches), indexing="ij")
    angles = torch.stack([row, column], -1) * math.pi / 2
    features = torch.cat([angles.cos(), angles.sin()], -1).expand(1, grid.frames, *patches, 4)
    unit = encoder_teacher(features, grid).unit_BFPE.unflatten(2, (grid.rows, grid.columns))
    found = torch.atan2(unit[..., 2:], unit[..., :2]) / (math.pi / 2)
    rows = ((torch.arange(grid.rows) + 0.5) / grid.rows)[:, None]
    columns = ((torch.arange(grid.columns) + 0.5) / grid.columns)[None]
    border = 1 / min(patches)  # where the filter ends at the image's edge
    assert (found[..., 0] - rows).abs().max() < border
    assert (found[..., 1] - columns).abs().max() < border
    assert (found[..., 0] - rows).abs().mean() < 0.005
    assert (found[..., 1] - columns).abs().mean() < 0.005


def test_resampling_to_a_coarser_grid_sees_every_patch():
    features = torch.zeros(1, 1, 16, 16, 3)
    features[..., 0] = 1
    plain = encoder_teacher(features, Grid(1, 4, 4)).unit_BFPE
    for at in range(16):
        changed = features.clone()
        changed[0, 0, at, at, 1] = 1
        assert not torch.equal(encoder_teacher(changed, Grid(1, 4, 4)).unit_BFPE, plain), at


def test_a_backbone_teacher_knows_what_is_there():
    tokens = draw(2, 7, 6).requires_grad_()
    places = torch.tensor([[0, 1, 13, 25, 40, 58, 59], [3, 4, 5, 6, 7, 8, 9]])
    teacher = backbone_teacher(tokens, places, GRID)
    assert not teacher.unit_BFPE.requires_grad
    flat, there = teacher.unit_BFPE.flatten(1, 2), teacher.present_BFP.flatten(1)
    assert there.sum(1).tolist() == [7, 7]
    for b in range(2):
        assert torch.allclose(flat[b, places[b]], F.normalize(tokens[b].detach(), dim=-1))
        assert torch.equal(there[b].nonzero()[:, 0], places[b])
        assert flat[b][there[b] == 0].abs().max() == 0


def test_a_teacher_that_is_not_there_contributes_nothing_and_weighs_nothing():
    tokens = draw(1, 12, 6)
    teacher = backbone_teacher(tokens, torch.arange(12, 24)[None], GRID)  # frame 1 alone
    weights = Neighbours().weights(5)
    student = F.normalize(tokens, dim=-1)
    frame_2 = alignment(student, teacher, weights, places_BK=torch.arange(24, 36)[None])
    assert frame_2.total_B.item() == pytest.approx(math.exp(-1), abs=1e-5)
    assert frame_2.own_B.item() == 0
    normal = alignment(student, teacher, weights, places_BK=torch.arange(24, 36)[None], normalize_sum=True)
    assert normal.total_B.item() == pytest.approx(1, abs=1e-5)
    frame_4 = alignment(student, teacher, weights, places_BK=torch.arange(48, 60)[None], normalize_sum=True)
    assert frame_4.total_B.item() == 0


def test_the_similarity_with_the_own_frame_is_reported_without_gradient():
    student, features = data(patches=(3, 4))
    found = alignment(student.requires_grad_(), encoder_teacher(features, GRID), Neighbours().weights(5))
    wanted = F.cosine_similarity(student.detach(), features.reshape(2, TOKENS, 6), dim=-1).mean(1)
    assert torch.allclose(found.own_B, wanted, atol=1e-6)
    assert not found.own_B.requires_grad
