"""What techniques answer with: regularizers, block interceptors, offload strategies.

Techniques know a model through its `Anatomy` and these interfaces only. Subclass what you need; every method has a
working default. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hooktuner.family import Anatomy
    from hooktuner.step import Step

Stage = Literal["route", "observe", "reside"]
STAGES: tuple[Stage, ...] = ("route", "observe", "reside")


@dataclass(frozen=True)
class Clip:
    """One encoded view of a clip, for `encode_features`."""

    key: str
    frames_FHWC: np.ndarray
    """uint8 RGB frames, exactly those that were encoded into latents."""
    frame_rate: float
    latent_shape: tuple[int, int, int, int]
    """(C, F, H, W)."""


@dataclass
class BlockCall:
    """One call of one block, with the positional arguments of the unmodified model."""

    block: torch.nn.Module
    index: int | None
    """Position among `Anatomy.blocks`, or None for an extra block."""
    args: tuple[Any, ...]
    anatomy: Anatomy
    step: Step
    kept_BK: torch.Tensor | None = None
    """Sorted indices, per sample of the call, of the tokens that are still there; None: all. A route sets it for what
    it proceeds to, so that what observes knows which tokens it sees."""
    first_args: tuple[Any, ...] | None = None
    """The arguments with which the model called its first main block in the forward pass under way, before anything
    was routed: what observes a routed call reads the whole sequence's grid and token order from them."""
    checkpointed: bool = False
    """For the stage `reside`: the call is recomputed in the backward pass, and autograd's saved tensors are managed by
    that; otherwise autograd keeps what the block saves."""
    notes: dict[str, Any] = field(default_factory=dict)
    """For the stage `reside`: empty in the forward pass; the recomputation gets the same dictionary with what was left
    in it, each interceptor under its plugin's name."""


class BlockInterceptor:
    """Wraps block calls. `stage` decides where: see `intercept_blocks`."""

    stage: Stage = "observe"

    def begin(self, step: Step) -> None:
        """A forward pass with gradients begins."""

    def end(self, step: Step) -> None:
        """The backward pass of the micro-step is over, also after an exception."""

    def call(self, call: BlockCall, proceed: Callable[[BlockCall], Any]) -> Any:
        """Do the call, usually through `proceed(call)` exactly once, and return the block's output."""
        return proceed(call)


class Regularizer:
    """Loss terms besides the family's."""

    def terms(self, step: Step) -> Mapping[str, torch.Tensor]:
        """Scalars that are added to the loss, already weighted; "" is the plugin's own name. Called after
        `compute_loss`, with gradients."""
        return {}

    def metrics(self, step: Step) -> Mapping[str, torch.Tensor]:
        """Further scalars to log as `<plugin>/<name>`, not part of the loss. Called after `terms`; the names are a
        function of the step's number. They travel with the losses, so a device is never waited for, and arrive,
        averaged over the global batch, in `StepResult.metrics`."""
        return {}

    def modules(self) -> Mapping[str, torch.nn.Module]:
        """Trainable modules of the regularizer, by name; they join the optimizer and the run's state."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """Further state as JSON values: thresholds, counters. Saved with every checkpoint."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""


class OffloadStrategy:
    """Where weights live."""

    def place(self) -> None:
        """Move the model to where it trains."""
        raise TypeError(f"{type(self).__name__} does not say where the model goes: define place()")

    def out_of_memory(self) -> bool:
        """The device ran out of memory in a step. Return True after making room: the same step is then repeated."""
        return False

    def report(self) -> Mapping[str, float]:
        """Numbers about the step that has just finished, for `timings.jsonl`: bytes moved, seconds stalled …"""
        return {}

    def close(self) -> None:
        """Undo everything that was attached to the model."""
