"""The ReflexFlow terms against float64 references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hooktuner.step import Conditioning
from hooktuner_scheduled_sampling import NAME
from hooktuner_scheduled_sampling.reflexflow import anti_drift, frequency_weight

ON = {"max_step_offset": 40, "inference_steps": 50, "probability": 0.5, "reflexflow": True}


def predicted(one, batch):
    step = one.draw(batch)
    step.prediction_BCFHW = one.kernel.predict(step)
    return step


def reference(step, clean, alpha, beta1, beta2):
    """(anti-drift, correction of the flow loss) as means over the micro-batch, in float64, sample by sample."""
    drifts, corrections = [], []
    count = step.weight_B1FHW
    for row, rolled in enumerate(step.notes[NAME].rolled_B.tolist()):
        if not rolled:
            drifts.append(torch.zeros((), dtype=torch.float64))
            corrections.append(torch.zeros((), dtype=torch.float64))
            continue
        keep = torch.ones_like(step.target_BCFHW[row], dtype=torch.bool)
        if count is not None:
            keep = count[row].expand_as(step.target_BCFHW[row]).bool()
        v, target, x, x0, v_clean = (
            value[row].detach().double()[keep]
            for value in (
                step.prediction_BCFHW,
                step.target_BCFHW,
                step.noisy_BCFHW,
                step.batch.latents_BCFHW,
                clean,
            )
        )
        a = x - x0
        drift = (v / v.norm() - a / a.norm()).square().sum()
        bias = v_clean - v
        weight = (1 + alpha * bias / bias.abs().mean()).clamp(0, 2)
        plain = (v - target).square()
        drifts.append(beta1 * drift)
        corrections.append(beta2 * (weight * plain).mean() - plain.mean())
    return torch.stack(drifts).mean(), torch.stack(corrections).mean()


def clean_velocity(one, batch, step):
    sigma = batch.sigma_B.view(-1, 1, 1, 1, 1)
    clean = (1 - sigma) * batch.latents_BCFHW + sigma * batch.noise_BCFHW
    if step.conditioning is not None:
        clean = torch.where(step.conditioning.given_B1FHW, step.conditioning.latents_BCFHW, clean)
    with torch.no_grad():
        return one.plugins.predict(one.run, one.kernel.denoiser, replace(step, noisy_BCFHW=clean, notes={}))


@pytest.mark.parametrize("flavour", [None, "toy-i2v"])
@pytest.mark.parametrize(("alpha", "beta1", "beta2"), [(1.0, 10.0, 1.0), (0.3, 0.5, 2.0)])
def test_the_terms_are_those_of_the_equations_on_rolled_out_samples_only(kit, flavour, alpha, beta1, beta2):
    keys = {"reflexflow_alpha": alpha, "reflexflow_beta1": beta1, "reflexflow_beta2": beta2}
    one = kit(**ON, **keys, flavour=flavour)
    batch = one.batch()
    step = predicted(one, batch)
    assert set(step.notes[NAME].rolled_B.tolist()) == {True, False}
    clean = clean_velocity(one, batch, step)
    torch.testing.assert_close(step.notes[NAME].clean_BCFHW, clean, rtol=1e-5, atol=1e-5)
    terms = one.kernel.losses(step)
    drift, correction = reference(step, clean, alpha, beta1, beta2)
    assert set(terms) == {"flow", f"{NAME}/anti_drift", f"{NAME}/frequency"}
    assert terms[f"{NAME}/anti_drift"].item() == pytest.approx(drift.item(), rel=1e-4)
    assert terms[f"{NAME}/frequency"].item() == pytest.approx(correction.item(), rel=1e-3, abs=1e-6)


def test_the_whole_loss_is_beta2_times_the_weighted_flow_loss_plus_beta1_times_the_drift(kit):
    one = kit(**{**ON, "probability": 1}, reflexflow_beta1=0.7, reflexflow_beta2=0.4)
    step = predicted(one, one.batch(3))
    clean = step.notes[NAME].clean_BCFHW
    weight = frequency_weight(clean, step.prediction_BCFHW, 1.0)
    flow = (weight * (step.prediction_BCFHW - step.target_BCFHW).square()).mean()
    total = sum(value.item() for value in one.kernel.losses(step).values())
    assert total == pytest.approx((0.4 * flow + 0.7 * anti_drift(step).mean()).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "names", "forwards"),
    [
        ({}, {"anti_drift", "frequency"}, 3),
        ({"reflexflow_alpha": 0}, {"anti_drift"}, 2),
        ({"reflexflow_beta1": 0}, {"frequency"}, 3),
        ({"reflexflow_alpha": 0, "reflexflow_beta2": 0.5}, {"anti_drift", "frequency"}, 2),
        ({"reflexflow_beta2": 0}, {"anti_drift", "frequency"}, 2),
        ({"reflexflow": False}, set(), 2),
    ],
)
def test_each_term_is_there_only_where_it_counts(kit, keys, names, forwards):
    one = kit(**{**ON, "max_step_offset": 40, "inference_steps": 40, **keys})
    step = one.draw(one.batch(2))
    assert len(one.family.calls) == forwards
    step.prediction_BCFHW = one.kernel.predict(step)
    assert set(one.kernel.losses(step)) == {"flow", *(f"{NAME}/{name}" for name in names)}


def test_without_reflexflow_there_is_no_term_and_no_further_forward_pass(kit):
    one = kit(max_step_offset=20, probability=1)
    step = predicted(one, one.batch(2))
    assert len(one.family.calls) == 2  # the rollout's one, and the prediction
    assert set(one.kernel.losses(step)) == {"flow"}
    assert step.notes[NAME].clean_BCFHW is None


def test_a_micro_batch_without_rolled_out_samples_gets_no_gradient_from_the_terms(kit):
    one, plain = kit(**{**ON, "probability": 1e-9}), kit()
    terms, gradients = one.gradients(one.batch(2))
    expected_terms, expected = plain.gradients(plain.batch(2))
    assert terms[f"{NAME}/anti_drift"] == terms[f"{NAME}/frequency"] == 0
    assert terms["flow"] == expected_terms["flow"]
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-6, atol=1e-9)


class Bare:
    """As much of a step as the anti-drift term reads."""

    def __init__(self, prediction, noisy, latents, conditioning=None):
        self.prediction_BCFHW, self.noisy_BCFHW, self.target_BCFHW = prediction, noisy, prediction
        self.batch = type("Batch", (), {"latents_BCFHW": latents})()
        self.weight_B1FHW = None
        if conditioning is not None:
            self.weight_B1FHW = (~conditioning.given_B1FHW).float()


def tensors(*seeds):
    return [torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def test_the_drift_is_0_along_the_line_to_the_data_and_4_against_it_and_has_no_scale():
    x, x0 = tensors(0, 1)
    zero, four, two = torch.zeros(3), torch.full((3,), 4.0), torch.full((3,), 2.0)
    torch.testing.assert_close(anti_drift(Bare(3 * (x - x0), x, x0)), zero, atol=1e-6, rtol=0)
    torch.testing.assert_close(anti_drift(Bare(-0.1 * (x - x0), x, x0)), four, atol=1e-5, rtol=0)
    (v,) = tensors(2)
    a = (x - x0).flatten(1)
    across = (v.flatten(1) - (v.flatten(1) * a).sum(1, keepdim=True) / a.square().sum(1, keepdim=True) * a).view_as(v)
    torch.testing.assert_close(anti_drift(Bare(across, x, x0)), two, atol=1e-5, rtol=0)
    torch.testing.assert_close(anti_drift(Bare(v, x, x0)), anti_drift(Bare(1000 * v, x, x0)))


def test_the_drift_of_a_clean_state_points_where_the_flow_target_does():
    x0, noise = tensors(3, 4)
    x = 0.7 * x0 + 0.3 * noise
    torch.testing.assert_close(anti_drift(Bare(noise - x0, x, x0)), torch.zeros(3), atol=1e-6, rtol=0)


def test_the_drift_draws_a_drifted_state_back_to_the_data():
    x0, delta = tensors(5, 6)
    v = torch.zeros_like(x0).add_(0.01).requires_grad_()
    anti_drift(Bare(v, x0 + delta, x0)).sum().backward()
    assert ((-v.grad * delta).flatten(1).sum(1) > 0).all()  # descent turns v towards x̂ − x0, so x − σ·v towards x0


def test_given_latents_do_not_count_in_the_drift():
    x, x0, v = tensors(7, 8, 9)
    given = torch.zeros(3, 1, 2, 1, 1, dtype=torch.bool)
    given[:, :, 0] = True
    conditioning = Conditioning(given_B1FHW=given, latents_BCFHW=x0)
    masked = anti_drift(Bare(v, x, x0, conditioning))
    v[:, :, 0], x[:, :, 0] = 100.0, -50.0
    torch.testing.assert_close(anti_drift(Bare(v, x, x0, conditioning)), masked)
    torch.testing.assert_close(anti_drift(Bare(v[:, :, 1:], x[:, :, 1:], x0[:, :, 1:])), masked)


def test_the_weights_are_one_without_bias_and_within_0_and_2():
    v, other = tensors(10, 11)
    assert torch.equal(frequency_weight(v, v, 1.0), torch.ones_like(v))
    weight = frequency_weight(v, other, 1.0)
    assert 0 <= weight.min() < 0.5
    assert 1.5 < weight.max() <= 2
    bias = (v - other).double()
    expected = 1 + 0.1 * bias / bias.abs().flatten(1).mean(1).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(frequency_weight(v, other, 0.1).double(), expected, rtol=1e-5, atol=1e-5)
    assert not frequency_weight(v.requires_grad_(), other, 1.0).requires_grad


def test_the_weights_matter_for_a_million_elements():
    generator = torch.Generator().manual_seed(0)
    clean, rolled, target = (torch.randn(1, 16, 4, 128, 128, generator=generator) for _ in range(3))
    error = 2 * (rolled - target)
    change = (frequency_weight(clean, rolled, 1.0) - 1) * error
    assert change.norm() > 0.3 * error.norm()
