"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch

from hooktuner.config import RunConfig
from hooktuner.train.adapters import Trainables

HORIZON_SCHEDULES = ("cosine", "sine")
"""Schedules for which the tool that existing configs come from reads `lr_warmup_steps` as the horizon."""


def make_optimizer(config: RunConfig, trainables: Trainables) -> torch.optim.Optimizer:
    """AdamW over all groups, fused: one kernel per step, and it can skip a step without asking the device."""
    groups = [{"params": list(group.values()), "name": name} for name, group in trainables.groups.items() if group]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate(config: RunConfig, step: int, total: int) -> float:
    """The learning rate of optimizer step `step` (counted from 1) of `total`.

    The first `lr_warmup_steps` rise linearly, so that step 1 already moves. After that the schedule runs over what is
    left. Where a cosine's warm-up would fill the whole run, the number is read as the cosine's horizon instead, as
    the tool these configs come from does (`horizon_note` says so).
    """
    warmup = config.lr_warmup_steps
    peak, end, kind = config.learning_rate, config.lr_end, config.lr_scheduler
    span = max(total - warmup, 1)
    if warmup_is_horizon(config, total):
        warmup, span = 0, warmup
    if step <= warmup:
        return peak * step / warmup
    progress = min((step - 1 - warmup) / span, 1.0)
    if kind in ("constant", "constant_with_warmup"):
        return peak
    if kind == "linear":
        return end + (peak - end) * (1 - progress)
    if kind == "polynomial":
        return end + (peak - end) * (1 - progress) ** config.lr_power
    if kind == "cosine":
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))
    cycle = (progress * config.lr_num_cycles) % 1.0 if progress < 1 else 1.0
    if kind == "cosine_with_restarts":
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * cycle))
    # sine: down to the end value and back up in every cycle
    return end + (peak - end) * 0.5 * (1 + math.cos(2 * math.pi * cycle))


def warmup_is_horizon(config: RunConfig, total: int) -> bool:
    """Whether `lr_warmup_steps` names a cosine's horizon: it reaches the end of the run."""
    return config.lr_scheduler in HORIZON_SCHEDULES and config.lr_warmup_steps >= total


def horizon_note(config: RunConfig, total: int) -> str | None:
    """The sentence for the report where `lr_warmup_steps` is read as a horizon."""
    if not warmup_is_horizon(config, total):
        return None
    return (
        f"lr_warmup_steps ({config.lr_warmup_steps}) reaches the end of the run ({total} steps): read as the horizon "
        f"of the {config.lr_scheduler} schedule, without a warm-up."
    )
