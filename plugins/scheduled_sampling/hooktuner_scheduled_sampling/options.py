"""The config keys, what does not fit together among them, and the probability of a step. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from hooktuner.config import Flag, PluginOptions
from hooktuner.context import Run
from hooktuner.errors import Problem
from pydantic import Field

_KEY = "scheduled_sampling_"
_RAMP = ("prob_start", "prob_end", "start_step", "ramp_shape")
_REFLEXFLOW = ("reflexflow_alpha", "reflexflow_beta1", "reflexflow_beta2")


class ScheduledSamplingOptions(PluginOptions):
    """Options of `scheduled-sampling`."""

    scheduled_sampling_max_step_offset: int | None = Field(
        None,
        ge=0,
        le=999,
        description="Switches scheduled sampling on: rollouts start at most so many thousandths of the noise schedule, "
        "measured before the shift, above the noise level that is trained; 0 is off.",
    )
    scheduled_sampling_inference_steps: int = Field(
        50,
        ge=1,
        le=1000,
        description="Sampling steps over the whole schedule that rollouts imitate: no solver step is longer than one "
        "of these. Rollouts take ceil(max_step_offset · inference_steps / 1000) steps.",
    )
    scheduled_sampling_probability: float = Field(
        0.0, ge=0, le=1, description="Share of samples that are rolled out; where a ramp is on, its start."
    )
    scheduled_sampling_prob_start: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of samples that are rolled out at the start of the ramp; default: "
        "scheduled_sampling_probability.",
    )
    scheduled_sampling_prob_end: float = Field(
        0.5, ge=0, le=1, description="Share of samples that are rolled out at the end of the ramp and after it."
    )
    scheduled_sampling_ramp_steps: int = Field(
        0, ge=0, description="Optimizer steps over which the share goes from prob_start to prob_end; 0: no ramp."
    )
    scheduled_sampling_start_step: int = Field(
        0, ge=0, description="Optimizer steps before the ramp begins; until then the share is prob_start."
    )
    scheduled_sampling_ramp_shape: Literal["linear", "cosine"] = Field(
        "linear", description="Shape of the ramp: `linear`, or `cosine` (½ − ½·cos(π·progress))."
    )
    scheduled_sampling_strategy: Literal["uniform", "biased_early", "biased_late"] = Field(
        "uniform",
        description="Law of the offset, with u uniform in [0, 1): `uniform` u·max, `biased_early` u²·max (shorter "
        "rollouts), `biased_late` (1−u²)·max (longer rollouts).",
    )
    scheduled_sampling_sampler: Literal["euler", "unipc", "dpm"] = Field(
        "unipc",
        description="Solver of the rollouts: `euler`, `unipc` (UniPC, B2(h)) or `dpm` (DPM-Solver++ multistep).",
    )
    scheduled_sampling_order: int = Field(2, ge=1, le=3, description="Order of `unipc` and `dpm`; `euler` has none.")
    scheduled_sampling_target: Literal["unchanged", "to_data"] = Field(
        "unchanged",
        description="Velocity target of rolled-out samples: `unchanged` (noise − data), or `to_data`, the straight "
        "line from the rolled-out state to the data, (state − data)/σ.",
    )
    scheduled_sampling_reflexflow: Flag | None = Field(
        None, description="Add the ReflexFlow terms to rolled-out samples; off unless it is true."
    )
    scheduled_sampling_reflexflow_alpha: float = Field(
        1.0, ge=0, description="Strength of the frequency weights 1 + alpha·Δ/mean|Δ|, limited to 0 … 2; 0: none."
    )
    scheduled_sampling_reflexflow_beta1: float = Field(
        10.0, ge=0, description="Weight of the anti-drift term (squared distance of unit vectors, 0 … 4); 0: none."
    )
    scheduled_sampling_reflexflow_beta2: float = Field(
        1.0, ge=0, description="Weight of the flow loss of rolled-out samples."
    )

    def active(self) -> bool | None:
        """A positive largest offset switches on, an explicit 0 off."""
        offset = self.scheduled_sampling_max_step_offset
        return None if offset is None else offset > 0

    @property
    def max_offset(self) -> float:
        """The largest offset as a share of the schedule before the shift."""
        return (self.scheduled_sampling_max_step_offset or 0) / 1000

    @property
    def rollout_steps(self) -> int:
        """Solver steps of every rollout, whatever its samples drew; each is one forward pass of the micro-batch."""
        return math.ceil(self.max_offset * self.scheduled_sampling_inference_steps - 1e-9)

    @property
    def drift_weight(self) -> float:
        """beta1 where ReflexFlow is on, otherwise 0."""
        return self.scheduled_sampling_reflexflow_beta1 if self.scheduled_sampling_reflexflow else 0.0

    @property
    def frequency_strength(self) -> float:
        """alpha where ReflexFlow is on and its weighted loss counts, otherwise 0."""
        counts = self.scheduled_sampling_reflexflow and self.scheduled_sampling_reflexflow_beta2 > 0
        return self.scheduled_sampling_reflexflow_alpha if counts else 0.0

    @property
    def forwards(self) -> int:
        """Forward passes without gradients in each micro-batch of a step whose probability is not 0."""
        return self.rollout_steps + (self.frequency_strength > 0)

    def probability(self, step: int) -> float:
        """Share of samples that are rolled out in the optimizer step `step`, counted from 1."""
        share, length = self.scheduled_sampling_probability, self.scheduled_sampling_ramp_steps
        if length == 0:
            return share
        start = share if self.scheduled_sampling_prob_start is None else self.scheduled_sampling_prob_start
        progress = min(max((step - 1 - self.scheduled_sampling_start_step) / length, 0.0), 1.0)
        if self.scheduled_sampling_ramp_shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return (1 - progress) * start + progress * self.scheduled_sampling_prob_end

    def problems(self, run: Run) -> Iterable[Problem]:
        """Keys that would do nothing."""
        written = self.model_fields_set
        offset = f"{_KEY}max_step_offset"
        if self.scheduled_sampling_max_step_offset is None:
            yield Problem(
                offset,
                "the plugin scheduled-sampling is active, and nothing says where its rollouts start",
                "Set it to the largest offset in thousandths of the schedule, such as 20, or remove the plugin.",
            )
        if self.scheduled_sampling_ramp_steps == 0:
            for name in _RAMP:
                if _KEY + name in written:
                    yield Problem(
                        _KEY + name,
                        f"without {_KEY}ramp_steps there is no ramp, so it does nothing",
                        f"Set {_KEY}ramp_steps, or set only {_KEY}probability.",
                    )
        elif {f"{_KEY}probability", f"{_KEY}prob_start"} <= written:
            yield Problem(
                f"{_KEY}probability",
                f"{_KEY}prob_start already says where the ramp starts, so it does nothing",
                "Remove one of the two.",
            )
        if (
            self.scheduled_sampling_sampler == "euler"
            and f"{_KEY}order" in written
            and self.scheduled_sampling_order > 1
        ):
            yield Problem(
                f"{_KEY}order",
                f"the Euler solver has order 1, not {self.scheduled_sampling_order}",
                f'Remove it, or set "{_KEY}sampler" to "unipc" or "dpm".',
            )
        yield from self._reflexflow_problems(written)

    def _reflexflow_problems(self, written: set[str]) -> Iterable[Problem]:
        if not self.scheduled_sampling_reflexflow:
            for name in _REFLEXFLOW:
                if _KEY + name in written:
                    yield Problem(
                        _KEY + name,
                        f"{_KEY}reflexflow is off, so it does nothing",
                        f'Set "{_KEY}reflexflow": true, or remove it.',
                    )
        elif (
            self.scheduled_sampling_reflexflow_beta1 == 0
            and self.scheduled_sampling_reflexflow_alpha == 0
            and self.scheduled_sampling_reflexflow_beta2 == 1
        ):
            yield Problem(
                f"{_KEY}reflexflow",
                "with alpha 0, beta1 0 and beta2 1 it adds nothing to the loss",
                "Change one of them, or set it to false.",
            )
        elif (
            self.scheduled_sampling_reflexflow_beta2 == 0
            and f"{_KEY}reflexflow_alpha" in written
            and self.scheduled_sampling_reflexflow_alpha > 0
        ):
            yield Problem(
                f"{_KEY}reflexflow_alpha",
                f"{_KEY}reflexflow_beta2 is 0, so there is no flow loss of rolled-out samples to weigh",
                "Set it to 0, or beta2 above 0.",
            )
