"""The solvers against the exact field, against diffusers' schedulers, and one sample at a time."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from fields import exact_velocity, reference
from hooktuner.flow import interpolate, velocity
from hooktuner_scheduled_sampling.solvers import integrate

EVERY = [("euler", 1), ("unipc", 1), ("unipc", 2), ("unipc", 3), ("dpm", 1), ("dpm", 2), ("dpm", 3)]


def nodes(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def line(start, end, steps, batch=1):
    return torch.linspace(start, end, steps + 1, dtype=torch.float64).expand(batch, -1)


def states(count=64, seed=0):
    return torch.randn(1, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.8


@pytest.mark.parametrize(
    ("sampler", "order", "expected"),
    [("euler", 1, 1), ("unipc", 1, 2), ("unipc", 2, 3), ("unipc", 3, 4), ("dpm", 1, 1), ("dpm", 2, 2), ("dpm", 3, 2)],
)
def test_the_error_falls_with_the_order_of_the_solver(sampler, order, expected):
    # UniPC of order p is of order p + 1 by its corrector, in every step but the last, which has none.
    # DPM-Solver++ of order 3 is what its authors' code and diffusers compute; see `_dpm` for why that is order 2.
    x, ends = states(32), (0.8, 0.4)
    exact = reference(x, *(torch.tensor([end]) for end in ends))
    errors = [
        (integrate(exact_velocity, x, line(*ends, steps), sampler=sampler, order=order) - exact).abs().mean().item()
        for steps in (32, 64)
    ]
    slope = math.log2(errors[0] / errors[1])
    assert slope == pytest.approx(expected, abs=0.45)


@pytest.mark.parametrize(("sampler", "order"), EVERY)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_straight_path_is_solved_exactly_whatever_the_steps(sampler, order, steps):
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(2, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    grid = torch.stack([line(0.9, 0.2, steps)[0], line(0.5, 0.45, steps)[0]])
    end = integrate(
        lambda x, sigma_B: velocity(x0, noise),
        interpolate(x0, noise, grid[:, 0]),
        grid,
        sampler=sampler,
        order=order,
    )
    torch.testing.assert_close(end, interpolate(x0, noise, grid[:, -1]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("sampler", "order"), EVERY)
def test_one_step_is_the_euler_step(sampler, order):
    x = states()
    one = integrate(exact_velocity, x, line(0.7, 0.6, 1), sampler=sampler, order=order)
    torch.testing.assert_close(
        one, x - 0.1 * exact_velocity(x, torch.tensor([0.7], dtype=torch.float64)), rtol=1e-12, atol=1e-12
    )


def test_unip_of_order_two_predicts_what_dpm_of_order_two_does():
    x = states()
    three = [integrate(exact_velocity, x, line(0.8, 0.5, 2), sampler=one, order=2) for one in ("unipc", "dpm")]
    assert not torch.equal(three[0], three[1])  # the corrector

    def constant_correction(x, sigma_B):  # D at node 1 as it was at node 0: the corrector has nothing to say
        return (x - 0.25) / sigma_B[:, None]

    same = [integrate(constant_correction, x, line(0.8, 0.5, 2), sampler=one, order=2) for one in ("unipc", "dpm")]
    torch.testing.assert_close(same[0], same[1], rtol=1e-12, atol=1e-12)


def scheduler_of(sampler, order, sigmas):
    """diffusers' scheduler on given noise levels; a level is appended, so that the last step is not special."""
    common = {"solver_order": order, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    tail = [*sigmas, sigmas[-1] / 2]
    if sampler == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=tail)
    elif sampler == "unipc":
        scheduler = UniPCMultistepScheduler(lower_order_final=False, solver_type="bh2", **common)
        scheduler.set_timesteps(sigmas=torch.tensor(tail, dtype=torch.float64).numpy())
    else:
        scheduler = DPMSolverMultistepScheduler(lower_order_final=False, algorithm_type="dpmsolver++", **common)
        scheduler.set_timesteps(len(tail))
        scheduler.sigmas = torch.tensor([*tail, 0.0], dtype=torch.float32)
    return scheduler


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")  # DPM-Solver's own
@pytest.mark.parametrize(("sampler", "order"), EVERY)
@pytest.mark.parametrize("sigmas", [[0.93, 0.88, 0.8, 0.71, 0.55, 0.5, 0.32], [0.4, 0.38, 0.36, 0.29]])
def test_every_step_agrees_with_the_scheduler_of_diffusers(sampler, order, sigmas):
    x = states().float()
    scheduler = scheduler_of(sampler, order, sigmas)
    theirs = x
    for step, sigma in enumerate(sigmas[:-1]):
        prediction = exact_velocity(theirs, torch.tensor([sigma]))
        theirs = scheduler.step(prediction, scheduler.timesteps[step], theirs).prev_sample
        ours = integrate(exact_velocity, x, nodes(sigmas[: step + 2]), sampler=sampler, order=order)
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5)
    assert (theirs - x).abs().max() > 0.05


@pytest.mark.parametrize(("sampler", "order"), EVERY)
def test_samples_that_start_later_get_what_they_get_alone(sampler, order):
    x = torch.cat([states(8, seed) for seed in range(4)])
    grid = nodes(
        [0.9, 0.8, 0.65, 0.6, 0.5],
        [0.7, 0.7, 0.7, 0.6, 0.55],
        [0.3, 0.3, 0.3, 0.3, 0.2],
        [0.4, 0.4, 0.4, 0.4, 0.4],
    )
    together = integrate(exact_velocity, x, grid, sampler=sampler, order=order)
    for row in range(4):
        own = torch.tensor(sorted(set(grid[row].tolist()), reverse=True), dtype=torch.float64)[None]
        alone = integrate(exact_velocity, x[row : row + 1], own, sampler=sampler, order=order)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(together[3], x[3])


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm"])
def test_the_velocity_is_asked_once_per_step_at_the_nodes(sampler):
    asked = []

    def spy(x, sigma_B):
        asked.append(sigma_B.tolist())
        return exact_velocity(x, sigma_B)

    integrate(spy, states(), nodes([0.9, 0.8, 0.7, 0.5]), sampler=sampler, order=3)
    assert asked == [[0.9], [0.8], [0.7]]


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="unknown sampler 'heun'; known: euler, unipc, dpm"):
        integrate(exact_velocity, states(), nodes([0.9, 0.8]), sampler="heun")
