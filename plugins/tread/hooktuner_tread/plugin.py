"""The plugin: hook methods that hand over to the modules that do the work. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooktuner import hookimpl
from hooktuner.errors import PluginError
from hooktuner.events import TrainingStarted

from hooktuner_tread import NAME
from hooktuner_tread.options import TreadOptions

if TYPE_CHECKING:
    import torch
    from hooktuner.config import PluginOptions
    from hooktuner.context import Run
    from hooktuner.events import Event
    from hooktuner.technique import BlockInterceptor

    from hooktuner_tread.router import Router


class Tread:
    """The technique `tread`."""

    needs = frozenset({"blocks", "token_routing"})

    def __init__(self) -> None:
        self._router: Router | None = None

    @hookimpl
    def options(self) -> type[PluginOptions]:
        """`tread_config` and `tread_disable_after`."""
        return TreadOptions

    @hookimpl
    def intercept_blocks(self, run: Run, model: torch.nn.Module) -> BlockInterceptor:
        """The router. Errors: `ModelError` for routes that the model cannot do, naming their JSON paths."""
        from hooktuner_tread.router import Router
        from hooktuner_tread.routes import resolve

        options = run.options_of(NAME, TreadOptions)
        assert options.tread_config is not None, "`TreadOptions.problems` refuses that"
        if run.card is None or run.anatomy is None:
            raise PluginError(
                f"{NAME} — the model family offers `token_routing` and has no anatomy. Report this to its authors."
            )
        blocks = len(run.anatomy.blocks(model))
        spans = resolve(options.tread_config, blocks, f"{run.card.name} ({run.flavour.name})")
        share = options.share(run)
        for span in spans:
            run.note(
                f"{NAME}: blocks {span.start} to {span.end} of {blocks} work on {1 - span.ratio:.0%} of the tokens"
                + (f", for the first {share:.0%} of the steps." if share < 1 else ".")
            )
        self._router = Router(spans, run.config.seed, share, run.config.max_train_steps)
        return self._router

    @hookimpl
    def on_event(self, event: Event) -> None:
        """Learn how long the run is."""
        if isinstance(event, TrainingStarted) and self._router is not None:
            self._router.total_steps = event.total_steps
