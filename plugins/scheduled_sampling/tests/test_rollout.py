"""Rollouts in the kernel, with the toy family."""

from __future__ import annotations

import pytest
import torch
from hooktuner.randomness import uniform
from hooktuner_scheduled_sampling import NAME
from hooktuner_scheduled_sampling.solvers import integrate

ON = {"max_step_offset": 100, "inference_steps": 25, "probability": 1}


def test_a_rolled_out_sample_is_where_the_model_arrives(kit):
    one = kit(**ON, sampler="unipc", order=2)
    batch = one.batch(2, sigma=[0.2, 0.5])
    step = one.draw(batch)
    calls, shift = one.family.calls, one.run.config.flow_schedule_shift
    assert shift == 3.0
    assert len(calls) == 3
    asked = torch.stack([call["sigma"] for call in calls], dim=1).double()
    nodes = torch.cat([asked, batch.sigma_B[:, None].double()], dim=1)
    start = (1 - asked[:, 0]).view(2, 1, 1, 1, 1) * batch.latents_BCFHW.double()
    start = start + asked[:, 0].view(2, 1, 1, 1, 1) * batch.noise_BCFHW.double()
    torch.testing.assert_close(calls[0]["noisy"].double(), start, rtol=1e-5, atol=1e-5)
    for row, index in enumerate(batch.index):
        position = batch.sigma_B[row].double() / (shift - (shift - 1) * batch.sigma_B[row].double())
        top = position + 0.1 * uniform(one.run.config.seed, "scheduled-sampling/offset", index)
        assert asked[row, 0].item() == pytest.approx((shift * top / (1 + (shift - 1) * top)).item(), rel=1e-5)

    def model(x, sigma_B):
        other = one.kernel.draw(batch, 1, 0)
        other.noisy_BCFHW, other.sigma_B, other.timestep_B = x.float(), sigma_B.float(), 1000 * sigma_B.float()
        with torch.no_grad():
            return one.plugins.predict(one.run, one.kernel.denoiser, other).to(x)

    for row in range(2):
        own = nodes[row : row + 1].unique_consecutive(dim=1).expand(2, -1)
        alone = integrate(model, start, own, sampler="unipc", order=2)[row]
        torch.testing.assert_close(step.noisy_BCFHW[row].double(), alone, rtol=1e-3, atol=1e-4)
    plain = (1 - batch.sigma_B).view(2, 1, 1, 1, 1) * batch.latents_BCFHW
    plain = plain + batch.sigma_B.view(2, 1, 1, 1, 1) * batch.noise_BCFHW
    assert ((step.noisy_BCFHW - plain).flatten(1).abs().amax(dim=1) > 1e-3).all()


def test_what_belongs_together_stays_together(kit):
    one = kit(**ON)
    batch = one.batch()
    step = one.draw(batch)
    assert torch.equal(step.sigma_B, batch.sigma_B)
    assert torch.equal(step.timestep_B, 1000 * batch.sigma_B)
    assert torch.equal(step.target_BCFHW, batch.noise_BCFHW - batch.latents_BCFHW)
    for call in one.family.calls:
        torch.testing.assert_close(call["timestep"], 1000 * call["sigma"])
        assert not call["gradients"]
    assert not step.noisy_BCFHW.requires_grad


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm"])
def test_the_solver_that_is_asked_for_is_used(kit, sampler):
    one = kit(**ON, sampler=sampler)
    batch = one.batch(3)
    step, calls = one.draw(batch), one.family.calls
    nodes = torch.stack([call["sigma"] for call in calls] + [batch.sigma_B], dim=1)
    asked = iter(calls)

    def replay(x, sigma_B):
        call = next(asked)
        torch.testing.assert_close(x, call["noisy"], rtol=1e-4, atol=1e-4)
        other = one.kernel.draw(batch, 1, 0)
        other.noisy_BCFHW, other.sigma_B, other.timestep_B = call["noisy"], call["sigma"], call["timestep"]
        with torch.no_grad():
            return one.plugins.predict(one.run, one.kernel.denoiser, other)

    calls = list(calls)
    asked = iter(calls)
    ends = integrate(replay, calls[0]["noisy"], nodes.double(), sampler=sampler, order=2)
    torch.testing.assert_close(ends, step.noisy_BCFHW, rtol=1e-4, atol=1e-4)


def test_solvers_differ_where_there_are_several_steps(kit, tmp_path):
    ends = []
    for sampler in ("euler", "unipc", "dpm"):
        one = kit(**ON, sampler=sampler)
        ends.append(one.draw(one.batch(3, sigma=0.3)).noisy_BCFHW)
    assert all((ends[a] - ends[b]).abs().max() > 1e-5 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_samples_that_are_not_rolled_out_keep_every_bit(kit):
    one, plain = kit(**{**ON, "probability": 0.5}), kit()
    batch = one.batch()
    step, without = one.draw(batch), plain.draw(plain.batch())
    expected = [uniform(one.run.config.seed, "scheduled-sampling/roll", index) < 0.5 for index in batch.index]
    assert step.notes[NAME].rolled_B.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    same = [torch.equal(a, b) for a, b in zip(step.noisy_BCFHW, without.noisy_BCFHW, strict=True)]
    assert same == [not rolled for rolled in expected]


def test_a_sample_does_not_depend_on_its_neighbours(kit):
    one = kit(**ON)
    together = one.draw(one.batch(4, sigma=0.4)).noisy_BCFHW
    for row in (0, 3):
        batch = one.batch(4, sigma=0.4)
        alone = type(batch)(
            keys=batch.keys[row : row + 1],
            index=batch.index[row : row + 1],
            latents_BCFHW=batch.latents_BCFHW[row : row + 1],
            noise_BCFHW=batch.noise_BCFHW[row : row + 1],
            sigma_B=batch.sigma_B[row : row + 1],
            text=batch.text[row : row + 1],
        )
        torch.testing.assert_close(one.draw(alone).noisy_BCFHW[0], together[row], rtol=1e-4, atol=1e-4)


def test_the_number_of_forward_passes_does_not_depend_on_the_draws(kit):
    one = kit(**{**ON, "probability": 0.2})
    counts = set()
    rolled = set()
    for first in range(0, 40, 4):
        step = one.draw(one.batch(1, first=first))
        counts.add(len(one.family.calls))
        rolled.update(step.notes[NAME].rolled_B.tolist())
    assert rolled == {True, False}
    assert counts == {3}


@pytest.mark.parametrize(
    "keys",
    [
        {"max_step_offset": 50},
        {"max_step_offset": 50, "probability": 0.0, "reflexflow": True},
        {"max_step_offset": 50, "prob_start": 0.0, "prob_end": 1.0, "ramp_steps": 5, "start_step": 1},
    ],
)
def test_at_probability_zero_there_is_no_forward_pass_no_term_and_no_other_bit(kit, keys):
    one, plain = kit(**keys), kit()
    assert one.draw(one.batch(2), number=2).notes == {}
    assert one.family.calls == []
    terms, gradients = one.gradients(one.batch(2), number=2)
    expected_terms, expected = plain.gradients(plain.batch(2), number=2)
    assert terms == expected_terms
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in gradients.items())


def test_a_ramp_begins_to_roll_out_at_its_step(kit):
    one = kit(max_step_offset=20, prob_start=0.0, prob_end=1.0, ramp_steps=1, start_step=3)
    counts = []
    for number in range(1, 7):
        one.draw(one.batch(1), number=number)
        counts.append(len(one.family.calls))
    assert counts == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rollouts_leave_the_random_streams_alone_and_see_no_dropout(kit, dropout):
    one = kit(**ON, config={"lora_dropout": dropout})
    batch = one.batch(2)
    before = torch.get_rng_state()
    first = one.draw(batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(one.draw(batch).noisy_BCFHW, first.noisy_BCFHW)
    assert one.kernel.denoiser.training
    modes = [module.training for module in one.kernel.denoiser.modules()]
    assert all(modes)


def test_given_latents_stay_given(kit):
    one = kit(**ON, flavour="toy-i2v")
    batch = one.batch(3)
    step = one.draw(batch)
    assert step.conditioning is not None
    first = batch.extras["first_latent"][:, :, 0]
    assert torch.equal(step.noisy_BCFHW[:, :, 0], first)
    assert len(one.family.calls) == 3
    for call in one.family.calls:
        assert torch.equal(call["noisy"][:, :, 0], first)
    assert step.notes[NAME].rolled_B.all()


def test_the_target_to_data_leads_from_the_rolled_out_state_to_the_data(kit):
    one = kit(**{**ON, "probability": 0.5}, target="to_data")
    batch = one.batch()
    step = one.draw(batch)
    landing = step.noisy_BCFHW - batch.sigma_B.view(-1, 1, 1, 1, 1) * step.target_BCFHW
    torch.testing.assert_close(landing, batch.latents_BCFHW, rtol=1e-4, atol=1e-4)
    plain = batch.noise_BCFHW - batch.latents_BCFHW
    same = [torch.equal(a, b) for a, b in zip(step.target_BCFHW, plain, strict=True)]
    assert same == [not rolled for rolled in step.notes[NAME].rolled_B.tolist()]


def test_the_share_of_rolled_out_samples_is_logged(kit):
    one = kit(**{**ON, "probability": 0.5})
    batch = one.batch()
    share = one.draw(batch).notes[NAME].rolled_B.float().mean().item()
    result = one.kernel.step(1, 0, 1e-3, [(0, batch)], 6).wait()
    assert result.metrics == {f"{NAME}/rolled": pytest.approx(share)}
    assert set(result.terms) == {"flow"}
