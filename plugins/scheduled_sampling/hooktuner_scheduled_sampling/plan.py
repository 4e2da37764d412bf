"""Which samples of a micro-batch are rolled out, and through which noise levels.

The noise schedule has a position p in (0, 1) before the shift s of the run, σ = s·p/(1 + (s−1)·p); samplers take
equal steps in p. A rollout ends at the sample's own σ, which is continuous, and begins an offset higher in p, at most
at p = 0.999. Its nodes lie on the sampler's grid counted from the end: one inference step apart, the first step being
the shorter rest. Every sample has the same number of nodes: those in front repeat where its rollout is shorter, and
all of them are its own σ where it is not rolled out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hooktuner.flow import shift_sigma
from hooktuner.randomness import uniform
from torch import Tensor

from hooktuner_scheduled_sampling.options import ScheduledSamplingOptions

LAST = 0.999
"""The position above which no rollout starts: at σ = 1 the solvers' λ = log((1−σ)/σ) has no value."""
_SAME = 1e-6
"""Positions nearer than this are one."""


@dataclass(frozen=True)
class Plan:
    """nodes_BN: σ from where the rollout starts to where it ends, float64. rolled_B: whether there is a rollout."""

    nodes_BN: Tensor
    rolled_B: Tensor


def draw_offset(options: ScheduledSamplingOptions, seed: int, index: int, step: int) -> float:
    """The offset in p of the sample with the run-wide number `index`; 0 where it is not rolled out in `step`."""
    if uniform(seed, "scheduled-sampling/roll", index) >= options.probability(step):
        return 0.0
    u = uniform(seed, "scheduled-sampling/offset", index)
    share = {"uniform": u, "biased_early": u * u, "biased_late": 1 - u * u}[options.scheduled_sampling_strategy]
    return share * options.max_offset


def make_plan(offsets: list[float], sigma_B: Tensor, *, shift: float, options: ScheduledSamplingOptions) -> Plan:
    """The plan of a micro-batch whose samples are trained at `sigma_B` (float32), on its device."""
    precise = torch.float32 if sigma_B.device.type == "mps" else torch.float64
    end_B = sigma_B.to(precise)
    position_B = end_B / (shift - (shift - 1) * end_B)
    offset_B = torch.tensor(offsets, dtype=precise).to(sigma_B.device, non_blocking=True)
    start_B = torch.maximum(position_B, (position_B + offset_B).clamp(max=LAST))
    start_B = torch.where(start_B - position_B < _SAME, position_B, start_B)
    columns = []
    for steps_left in range(options.rollout_steps, 0, -1):
        grid_B = position_B + steps_left / options.scheduled_sampling_inference_steps
        at_start = (grid_B > start_B - _SAME) | (steps_left == options.rollout_steps)
        columns.append(shift_sigma(torch.where(at_start, start_B, grid_B), shift))
    rolled_B = start_B > position_B
    nodes_BN = torch.where(rolled_B[:, None], torch.stack(columns, dim=1), end_B[:, None])
    return Plan(torch.cat([nodes_BN, end_B[:, None]], dim=1), rolled_B)
