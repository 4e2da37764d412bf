"""The weight of the term: a pure function of the step, and a guard that switches it off by similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hooktuner_crepa.options import CrepaOptions

DELAY = 2
"""In step n the guard knows the similarities up to step n − 2. On a GPU the numbers of a step arrive behind the next
one, but earlier where a checkpoint is saved; a fixed delay makes the decision the same in both cases."""


def scheduled_weight(options: CrepaOptions, step: int, total: int) -> float:
    """λ in optimizer step `step` (counted from 1) of `total`, without the guard.

    It rises linearly over `crepa_warmup_steps`, so that step 1 already has some, then goes from `crepa_lambda` to
    `crepa_lambda_end` over `crepa_decay_steps` (0: to the end of the run), and is 0 after `crepa_cutoff_step`.
    """
    start, end, warmup = options.crepa_lambda, options.crepa_lambda_end, options.crepa_warmup_steps
    if options.crepa_cutoff_step and step > options.crepa_cutoff_step:
        return 0.0
    if step <= warmup:
        return start * step / warmup
    if options.crepa_scheduler == "constant":
        return start
    span = options.crepa_decay_steps or max(total - warmup, 1)
    left = 1 - min((step - 1 - warmup) / span, 1.0)
    if options.crepa_scheduler == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    if options.crepa_scheduler == "polynomial":
        left **= options.crepa_power
    return end + (start - end) * left


class Guard:
    """Switches CREPA off while the running mean of the similarity is at the threshold or above.

    `arrived` takes the similarity of a finished step, averaged over the global batch and all processes; `open` is
    asked at the beginning of a step. What it decides depends on similarities and step numbers alone.
    """

    def __init__(self, options: CrepaOptions) -> None:
        self._threshold = options.crepa_similarity_threshold
        self._decay = options.crepa_similarity_ema_decay
        self._permanent = options.crepa_threshold_mode == "permanent"
        self._mean: float | None = None
        self._triggered = False
        self._waiting: list[tuple[int, float]] = []

    @property
    def measures_when_closed(self) -> bool:
        """Whether similarities are needed also while CREPA is off."""
        return not self._permanent

    def arrived(self, step: int, similarity: float) -> None:
        """The similarity of optimizer step `step`."""
        if self._threshold is not None:
            self._waiting.append((step, similarity))

    def open(self, step: int) -> bool:
        """Whether CREPA may be on in optimizer step `step`."""
        while self._waiting and self._waiting[0][0] <= step - DELAY:
            self._take(self._waiting.pop(0)[1])
        return not self._triggered

    def _take(self, similarity: float) -> None:
        assert self._threshold is not None
        mean = similarity if self._mean is None else self._decay * self._mean + (1 - self._decay) * similarity
        self._mean = mean
        self._triggered = (self._permanent and self._triggered) or mean >= self._threshold

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"mean": self._mean, "triggered": self._triggered, "waiting": [list(one) for one in self._waiting]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self._mean = state["mean"]
        self._triggered = state["triggered"]
        self._waiting = [(int(step), float(value)) for step, value in state["waiting"]]
