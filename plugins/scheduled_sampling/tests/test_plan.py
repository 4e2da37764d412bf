"""Who is rolled out, from where, and through which noise levels."""

from __future__ import annotations

import math

import pytest
import torch
from hooktuner.flow import shift_sigma
from hooktuner_scheduled_sampling.options import ScheduledSamplingOptions
from hooktuner_scheduled_sampling.plan import LAST, draw_offset, make_plan


def options(**keys):
    return ScheduledSamplingOptions(**{f"scheduled_sampling_{name}": value for name, value in keys.items()})


def plan_of(offsets, sigmas, shift=1.0, **keys):
    return make_plan(offsets, torch.tensor(sigmas, dtype=torch.float32), shift=shift, options=options(**keys))


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_nodes_are_one_inference_step_apart_before_the_shift_and_end_at_the_own_sigma(shift):
    sigma = shift_sigma(torch.tensor([0.3, 0.3, 0.3, 0.3]), shift).tolist()
    plan = plan_of([0.1, 0.05, 0.0, 0.04 + 1e-9], sigma, shift, max_step_offset=100, inference_steps=25)
    assert plan.rolled_B.tolist() == [True, True, False, True]
    before_shift = [[0.4, 0.38, 0.34, 0.3], [0.35, 0.35, 0.34, 0.3], [0.3] * 4, [0.34, 0.34, 0.34, 0.3]]
    expected = shift_sigma(torch.tensor(before_shift, dtype=torch.float64), shift)
    torch.testing.assert_close(plan.nodes_BN, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(plan.nodes_BN[:, -1], torch.tensor(sigma, dtype=torch.float32).double())
    assert torch.equal(plan.nodes_BN[3, 0], plan.nodes_BN[3, 2])  # a step of a rounding error's length is none
    assert torch.equal(plan.nodes_BN[2], plan.nodes_BN[2, :1].expand(4))


def test_rollouts_start_below_pure_noise_or_not_at_all():
    plan = plan_of([0.05, 0.05, 0.05], [0.98, 0.9995, LAST], max_step_offset=50)
    assert plan.nodes_BN[0, 0].item() == pytest.approx(LAST)
    assert plan.rolled_B.tolist() == [True, False, False]
    assert (plan.nodes_BN < 1).all()


@pytest.mark.parametrize(
    ("offset", "inference_steps", "steps"),
    [(1, 50, 1), (20, 50, 1), (21, 50, 2), (100, 50, 5), (60, 50, 3), (999, 8, 8)],
)
def test_every_plan_of_a_run_has_as_many_steps_as_the_largest_offset_needs(offset, inference_steps, steps):
    chosen = options(max_step_offset=offset, inference_steps=inference_steps)
    assert chosen.rollout_steps == steps
    for offsets in ([0.0, 0.0], [offset / 1000, 0.0], [offset / 1000 / 3] * 2):
        plan = make_plan(offsets, torch.tensor([0.2, 0.7]), shift=3.0, options=chosen)
        assert plan.nodes_BN.shape == (2, steps + 1)
        assert (plan.nodes_BN[:, 1:] <= plan.nodes_BN[:, :-1]).all()
        before_shift = plan.nodes_BN / (3 - 2 * plan.nodes_BN)
        assert (before_shift[:, :-1] - before_shift[:, 1:]).max() < 1 / inference_steps + 1e-6


@pytest.mark.parametrize(
    ("strategy", "mean", "below_half"),
    [("uniform", 1 / 2, 1 / 2), ("biased_early", 1 / 3, math.sqrt(0.5)), ("biased_late", 2 / 3, 1 - math.sqrt(0.5))],
)
def test_the_strategies_have_their_distributions(strategy, mean, below_half):
    chosen = options(max_step_offset=40, probability=1, strategy=strategy)
    offsets = torch.tensor([draw_offset(chosen, 7, index, 1) for index in range(20000)]) / 0.04
    assert 0 <= offsets.min() < offsets.max() <= 1
    assert offsets.mean().item() == pytest.approx(mean, abs=0.01)
    assert (offsets < 0.5).float().mean().item() == pytest.approx(below_half, abs=0.015)


def test_the_share_is_the_probability_and_draws_are_functions_of_seed_and_sample():
    chosen = options(max_step_offset=40, probability=0.3)
    draws = [draw_offset(chosen, 7, index, 1) for index in range(5000)]
    assert sum(value > 0 for value in draws) / 5000 == pytest.approx(0.3, abs=0.02)
    assert draws == [draw_offset(chosen, 7, index, 99) for index in range(5000)]
    assert draws != [draw_offset(chosen, 8, index, 1) for index in range(5000)]
    rolled = torch.tensor([value for value in draws if value > 0])  # whether and how far are unrelated
    assert rolled.mean().item() == pytest.approx(0.02, abs=0.001)


def test_a_ramp_goes_from_start_to_end_and_honours_zero():
    ramp = options(max_step_offset=1, prob_start=0.0, prob_end=0.8, ramp_steps=10, start_step=5, probability=0.4)
    assert [ramp.probability(step) for step in (1, 6, 11, 16, 500)] == pytest.approx([0, 0, 0.4, 0.8, 0.8])
    assert ramp.probability(6) == 0.0  # exactly
    assert ramp.probability(7) == pytest.approx(0.08)
    down = options(max_step_offset=1, prob_start=0.6, prob_end=0.0, ramp_steps=4)
    assert [down.probability(step) for step in (1, 2, 3, 5, 6)] == pytest.approx([0.6, 0.45, 0.3, 0, 0])
    cosine = options(max_step_offset=1, prob_start=0.2, prob_end=0.6, ramp_steps=4, ramp_shape="cosine")
    expected = [0.2 + 0.4 * (1 - math.cos(math.pi * progress / 4)) / 2 for progress in (0, 1, 2, 3, 4, 4)]
    assert [cosine.probability(step) for step in range(1, 7)] == pytest.approx(expected)


def test_without_a_start_the_ramp_starts_at_the_probability_and_without_a_ramp_it_stays():
    assert options(max_step_offset=1, probability=0.1, ramp_steps=2).probability(1) == 0.1
    assert options(max_step_offset=1, ramp_steps=2).probability(1) == 0.0
    assert options(max_step_offset=1, ramp_steps=2).probability(9) == 0.5
    assert [options(max_step_offset=1, probability=0.7).probability(step) for step in (1, 900)] == [0.7, 0.7]
    assert options(max_step_offset=1).probability(1) == 0
