"""The equations of `flow.py` against float64 references, and its laws against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hooktuner import flow
from hooktuner.randomness import derive_seed, generator, uniform


def test_the_path_runs_from_data_to_noise_and_its_slope_is_the_target():
    data, noise = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert torch.equal(flow.interpolate(data, noise, zero), data)
    assert torch.equal(flow.interpolate(data, noise, one), noise)
    sigma, h = torch.tensor([0.3, 0.7], dtype=torch.float64), 1e-6
    slope = (flow.interpolate(data, noise, sigma + h) - flow.interpolate(data, noise, sigma - h)) / (2 * h)
    torch.testing.assert_close(slope, flow.velocity(data, noise), rtol=1e-8, atol=1e-8)


def test_one_exact_euler_step_from_any_sigma_reaches_the_data():
    data, noise, sigma = torch.randn(4, 2, 1, 3, 3), torch.randn(4, 2, 1, 3, 3), torch.rand(4)
    noisy = flow.interpolate(data, noise, sigma)
    reached = noisy - flow.append_dims(sigma, noisy) * flow.velocity(data, noise)
    torch.testing.assert_close(reached, data, rtol=1e-5, atol=1e-5)


def test_timesteps_are_float32_and_not_rounded():
    sigma = torch.tensor([0.123456, 0.5, 0.99951])
    assert flow.timestep(sigma).dtype == torch.float32
    assert flow.timestep(sigma).tolist() == pytest.approx([123.456, 500.0, 999.51], rel=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 10.0])
def test_shift_has_its_closed_form_and_shift_one_changes_no_bit(shift):
    sigma = torch.linspace(0.001, 0.999, 777, dtype=torch.float64)
    shifted = flow.shift_sigma(sigma, shift)
    odds = sigma / (1 - sigma)  # the shift multiplies the odds
    torch.testing.assert_close(shifted / (1 - shifted), shift * odds)
    if shift == 1.0:
        assert shifted is sigma


def test_sigmoid_law_is_logit_normal():
    sigma = flow.draw_sigma(200_000, generator(0, "test"), sigmoid_scale=1.3).double().numpy()
    logits = np.log(sigma / (1 - sigma))
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1.3) < 0.02


def test_uniform_and_beta_laws_have_their_moments():
    uniform_draw = flow.draw_sigma(200_000, generator(0, "u"), law="uniform").double()
    assert abs(uniform_draw.mean() - 0.5) < 0.005
    assert abs(uniform_draw.var() - 1 / 12) < 0.002
    a, b = 2.0, 5.0
    beta_draw = flow.draw_sigma(200_000, generator(0, "b"), law="beta", beta=(a, b)).double()
    assert abs(beta_draw.mean() - a / (a + b)) < 0.005
    assert abs(beta_draw.var() - a * b / ((a + b) ** 2 * (a + b + 1))) < 0.002


@pytest.mark.parametrize("law", ["sigmoid", "uniform", "beta"])
def test_sigma_stays_inside_the_open_interval_and_is_reproducible(law):
    first = flow.draw_sigma(10_000, generator(3, "x"), law=law, sigmoid_scale=20, shift=10)
    again = flow.draw_sigma(10_000, generator(3, "x"), law=law, sigmoid_scale=20, shift=10)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert first.min() > 0
    assert first.max() < 1


def test_an_unknown_law_is_refused():
    with pytest.raises(ValueError, match="known: sigmoid, uniform, beta"):
        flow.draw_sigma(1, generator(0, "x"), law="gauss")


def test_loss_equals_a_float64_reference_with_and_without_weights():
    prediction, target = torch.randn(3, 4, 5, 6, 7), torch.randn(3, 4, 5, 6, 7)
    p, t = prediction.double().numpy(), target.double().numpy()
    plain = flow.mean_squared_error(prediction, target)
    assert plain.tolist() == pytest.approx([((p[i] - t[i]) ** 2).mean() for i in range(3)], rel=1e-6)
    weight = torch.ones(3, 1, 5, 1, 1)
    weight[:, :, 0] = 0  # a given first frame
    masked = flow.mean_squared_error(prediction, target, weight)
    assert masked.tolist() == pytest.approx([((p[i, :, 1:] - t[i, :, 1:]) ** 2).mean() for i in range(3)], rel=1e-6)


def test_a_sample_without_any_weight_has_loss_zero_and_a_zero_gradient():
    prediction = torch.randn(1, 2, 1, 3, 3, requires_grad=True)
    loss = flow.mean_squared_error(prediction, torch.randn(1, 2, 1, 3, 3), torch.zeros(1, 1, 1, 1, 1))
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_draws_depend_on_seed_purpose_and_every_number():
    seeds = {
        derive_seed(1, "noise", 5), derive_seed(2, "noise", 5), derive_seed(1, "sigma", 5), derive_seed(1, "noise", 6),
        derive_seed(1, "noise", 5, 0), derive_seed(1, "noise"),
    }  # fmt: skip
    assert len(seeds) == 6
    assert derive_seed(1, "noise", 5) == derive_seed(1, "noise", 5)
    assert torch.equal(torch.randn(4, generator=generator(1, "a", 2)), torch.randn(4, generator=generator(1, "a", 2)))


def test_uniform_numbers_are_uniform():
    numbers = [uniform(0, "dropout", index) for index in range(20_000)]
    assert all(0 <= number < 1 for number in numbers)
    assert math.isclose(sum(numbers) / len(numbers), 0.5, abs_tol=0.01)
    assert math.isclose(sum(number < 0.1 for number in numbers) / len(numbers), 0.1, abs_tol=0.01)
