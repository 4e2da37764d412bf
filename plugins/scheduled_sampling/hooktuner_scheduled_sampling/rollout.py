"""The hook `prepare_input`: samples are replaced by where the model itself arrives from a higher noise level.

Every micro-batch of a step takes the same number of forward passes, whatever was drawn, so processes stay together;
a step whose probability is 0 takes none and changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hooktuner.context import Run
from hooktuner.flow import append_dims, interpolate
from hooktuner.step import Step
from torch import Tensor

from hooktuner_scheduled_sampling import NAME
from hooktuner_scheduled_sampling.options import ScheduledSamplingOptions
from hooktuner_scheduled_sampling.plan import draw_offset, make_plan
from hooktuner_scheduled_sampling.solvers import Velocity, integrate


@dataclass(frozen=True)
class Rolled:
    """What is left in `step.notes` for the loss terms."""

    rolled_B: Tensor
    clean_BCFHW: Tensor | None
    """The model's velocity at the clean interpolant of the same σ, where the frequency weights need it."""


def prepare(run: Run, step: Step, predict: Velocity) -> Mapping[str, Tensor] | None:
    """`noisy_BCFHW` with rolled-out samples in their places, and `target_BCFHW` where they have another target.

    predict: (noisy_BCFHW, sigma_B) → velocity_BCFHW without gradients. σ stays what was drawn.
    """
    options = run.options_of(NAME, ScheduledSamplingOptions)
    if options.rollout_steps == 0 or options.probability(step.number) == 0:
        return None
    batch, clean = step.batch, step.noisy_BCFHW
    offsets = [draw_offset(options, run.config.seed, index, step.number) for index in batch.index]
    shift = run.config.flow_schedule_shift or 1.0
    with torch.no_grad():
        plan = make_plan(offsets, step.sigma_B, shift=shift, options=options)
        rolled = append_dims(plan.rolled_B, clean)
        start = interpolate(batch.latents_BCFHW, batch.noise_BCFHW, plan.nodes_BN[:, 0].to(clean))
        start = torch.where(rolled, start, clean)
        arrived = integrate(
            predict,
            start,
            plan.nodes_BN,
            sampler=options.scheduled_sampling_sampler,
            order=options.scheduled_sampling_order,
        )
        noisy = torch.where(rolled, arrived, clean)
        reference = predict(clean, step.sigma_B) if options.frequency_strength > 0 else None
        step.notes[NAME] = Rolled(plan.rolled_B, reference)
        answer = {"noisy_BCFHW": noisy}
        if options.scheduled_sampling_target == "to_data":
            to_data = (noisy - batch.latents_BCFHW) / append_dims(step.sigma_B, noisy)
            answer["target_BCFHW"] = torch.where(rolled, to_data, step.target_BCFHW)
    return answer
