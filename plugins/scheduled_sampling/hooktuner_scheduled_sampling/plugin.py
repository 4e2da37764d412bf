"""The plugin: hook methods that hand over to the module that does the work. No torch before a hook needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hooktuner import hookimpl

from hooktuner_scheduled_sampling import NAME
from hooktuner_scheduled_sampling.options import ScheduledSamplingOptions

if TYPE_CHECKING:
    import torch
    from hooktuner.config import PluginOptions
    from hooktuner.context import Run
    from hooktuner.step import Step
    from hooktuner.technique import Regularizer


class ScheduledSampling:
    """The technique `scheduled-sampling`. It needs nothing of a family but its velocity."""

    @hookimpl
    def options(self) -> type[PluginOptions]:
        """The config keys `scheduled_sampling_*`."""
        return ScheduledSamplingOptions

    @hookimpl
    def regularizer(self, run: Run) -> Regularizer:
        """The ReflexFlow terms and the share of rolled-out samples. Says in the start report what a step will cost."""
        options = run.options_of(NAME, ScheduledSamplingOptions)
        for sentence in _remarks(options, run.config.max_train_steps):
            run.note(sentence)
        from hooktuner_scheduled_sampling.reflexflow import RolloutTerms

        return RolloutTerms(options)

    @hookimpl
    def prepare_input(self, run: Run, step: Step, predict: Any) -> Mapping[str, torch.Tensor] | None:
        """Rolled-out samples in the places of noised ones."""
        from hooktuner_scheduled_sampling.rollout import prepare

        return prepare(run, step, predict)


def _remarks(options: ScheduledSamplingOptions, total: int | None) -> list[str]:
    """Sentences for the start report."""
    last = total or 10**9  # a ramp is monotone: nothing lies outside its ends
    if options.rollout_steps == 0 or options.probability(1) == options.probability(last) == 0:
        return [f"{NAME} never rolls out: the probability is 0 in every step."]
    remarks = [
        f"{NAME}: {options.forwards} more forward pass{'es' if options.forwards > 1 else ''} without gradients per "
        "micro-batch in steps whose probability is not 0."
    ]
    if options.rollout_steps == 1 and options.scheduled_sampling_sampler != "euler":
        remarks.append(f"{NAME}: rollouts are one step long, for which every solver is the Euler step.")
    return remarks
