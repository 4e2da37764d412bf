"""The plugin: hook methods that hand over to the modules that do the work. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooktuner import hookimpl
from hooktuner.errors import PluginError
from hooktuner.events import StepStarted

from hooktuner_group_offload import NAME
from hooktuner_group_offload.options import GroupOffloadOptions

if TYPE_CHECKING:
    import torch
    from hooktuner.config import PluginOptions
    from hooktuner.context import Run
    from hooktuner.events import Event
    from hooktuner.technique import BlockInterceptor, OffloadStrategy

    from hooktuner_group_offload.strategy import Offload


class GroupOffload:
    """Frozen weights rest in main memory or on disk and stream to the device block by block."""

    needs = frozenset({"blocks"})

    def __init__(self) -> None:
        self._offload: Offload | None = None

    @hookimpl
    def options(self) -> type[PluginOptions]:
        """`enable_group_offload` and its companions."""
        return GroupOffloadOptions

    @hookimpl
    def offload_strategy(self, run: Run, model: torch.nn.Module) -> OffloadStrategy:
        """Where the weights live."""
        from hooktuner_group_offload.strategy import Offload

        if run.anatomy is None:
            raise PluginError(
                f"{NAME} — the model family offers `blocks` and has no anatomy. Report this to its authors."
            )
        self._offload = Offload(run, model, run.options_of(NAME, GroupOffloadOptions))
        return self._offload

    @hookimpl
    def intercept_blocks(self, model: torch.nn.Module) -> BlockInterceptor:
        """What brings a block's weights while gradients are on."""
        offload = self._offload
        if offload is None or offload.model is not model:
            raise PluginError(f"{NAME} — intercept_blocks was called for a model that it has not placed.")
        return offload.interceptor

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Count bytes and stalls from the beginning of each optimizer step, rollouts included."""
        if isinstance(event, StepStarted) and self._offload is not None:
            self._offload.meter.open(event.number)
