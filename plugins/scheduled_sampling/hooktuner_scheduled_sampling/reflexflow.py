"""The ReflexFlow terms (later DEFAR): for rolled-out samples, and for no others.

With x̂ the rolled-out state, v̂ the model's velocity there (with gradients), x0 the data, and v the model's velocity at
the clean interpolant of the same σ (without gradients):

    anti-drift            ‖ v̂/‖v̂‖ − (x̂ − x0)/‖x̂ − x0‖ ‖²        norms over a sample; 0 … 4, equals 2·(1 − cosine)
    frequency weights     W = clip(1 + α·Δ/mean|Δ|, 0, 2),  Δ = v − v̂,  element by element
    loss of the sample    β2·(flow loss weighted with W) + β1·anti-drift

The flow loss itself is the kernel's; the terms here are what must be added to it. Given latents (a clean first frame)
count nowhere. Δ is divided by the mean and not by the sum of |Δ|: with the sum, weights of a video's million elements
differ from 1 by a millionth.
"""

from __future__ import annotations

from collections.abc import Mapping

from hooktuner.flow import append_dims
from hooktuner.step import Step
from hooktuner.technique import Regularizer
from torch import Tensor
from torch.nn import functional

from hooktuner_scheduled_sampling import NAME
from hooktuner_scheduled_sampling.options import ScheduledSamplingOptions
from hooktuner_scheduled_sampling.rollout import Rolled

_TINY = 1e-12


class RolloutTerms(Regularizer):
    """Adds the terms, where they are asked for, to steps that were rolled out, and logs the share of such samples."""

    def __init__(self, options: ScheduledSamplingOptions) -> None:
        self._drift = options.drift_weight
        self._strength = options.frequency_strength
        self._scale = options.scheduled_sampling_reflexflow_beta2

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """Means over the micro-batch; samples that are not rolled out count as 0."""
        rolled: Rolled | None = step.notes.get(NAME)
        if rolled is None:
            return {}
        terms = {}
        share_B = rolled.rolled_B.float()
        if self._drift > 0:
            terms["anti_drift"] = (self._drift * anti_drift(step) * share_B).mean()
        if self._strength > 0 or self._scale != 1:
            terms["frequency"] = (self._correction(step, rolled.clean_BCFHW) * share_B).mean()
        return terms

    def metrics(self, step: Step) -> Mapping[str, Tensor]:
        """`rolled`: the share of the micro-batch that was rolled out."""
        rolled: Rolled | None = step.notes.get(NAME)
        return {} if rolled is None else {"rolled": rolled.rolled_B.float().mean()}

    def _correction(self, step: Step, clean_BCFHW: Tensor | None) -> Tensor:
        """β2·(weighted flow loss) − flow loss, per sample: the flow loss is already in the total."""
        assert step.loss_B is not None
        assert step.prediction_BCFHW is not None
        correction_B = (self._scale - 1) * step.loss_B
        if clean_BCFHW is not None:
            weight = frequency_weight(clean_BCFHW, step.prediction_BCFHW, self._strength, step.weight_B1FHW)
            error = (step.prediction_BCFHW - step.target_BCFHW).square()
            correction_B = correction_B + self._scale * _mean((weight - 1) * error, step.weight_B1FHW)
        return correction_B


def anti_drift(step: Step) -> Tensor:
    """The squared distance between the unit vectors of the prediction and of x̂ − x0, (B,) in 0 … 4."""
    assert step.prediction_BCFHW is not None
    drift = step.noisy_BCFHW - step.batch.latents_BCFHW
    count = step.weight_B1FHW
    unit_v, unit_drift = (
        functional.normalize((value if count is None else value * count).float().flatten(1), dim=1)
        for value in (step.prediction_BCFHW, drift)
    )
    return (unit_v - unit_drift).square().sum(dim=1)


def frequency_weight(clean: Tensor, rolled: Tensor, alpha: float, count: Tensor | None = None) -> Tensor:
    """W, without gradients, in the shape of its inputs. count: 1 where elements count, 0 elsewhere; None: all do."""
    bias = clean.detach().float() - rolled.detach().float()
    size_B = _mean(bias.abs(), count)
    return (1 + alpha * bias / append_dims(size_B + _TINY, bias)).clamp(0, 2)


def _mean(values: Tensor, count: Tensor | None) -> Tensor:
    """Per-sample mean over the elements that count, (B,)."""
    if count is None:
        return values.flatten(1).mean(dim=1)
    count = count.expand_as(values)
    return (values * count).flatten(1).sum(dim=1) / count.flatten(1).sum(dim=1).clamp_min(_TINY)
