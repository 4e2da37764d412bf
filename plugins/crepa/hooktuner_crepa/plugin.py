"""The plugin: hook methods that hand over to the module that does the work.

This module is imported by `tuner plugins` and `tuner config check`, so nothing here imports torch before a hook needs
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hooktuner import hookimpl
from hooktuner.events import CachingFinished, Event, RunEnded, RunStarted, StepFinished, TrainingStarted

from hooktuner_crepa import NAME
from hooktuner_crepa.options import CrepaOptions

if TYPE_CHECKING:
    import torch
    from hooktuner.config import PluginOptions
    from hooktuner.context import Run
    from hooktuner.technique import BlockInterceptor, Clip, Regularizer

    from hooktuner_crepa.session import Session


class Crepa:
    """CREPA: aligns hidden states with a vision encoder's features across frames, against flicker and drift."""

    needs = ("blocks", "frames")

    def __init__(self) -> None:
        self._encoder: torch.nn.Module | None = None
        self._session: Session | None = None

    @hookimpl
    def options(self) -> type[PluginOptions]:
        """The config keys of CREPA."""
        return CrepaOptions

    @hookimpl
    def encode_features(self, run: Run, clip: Clip) -> Mapping[str, torch.Tensor]:
        """`patches`: the teacher's features, one frame per latent frame; nothing where a block is the teacher."""
        options = run.options_of(NAME, CrepaOptions)
        if options.source == "backbone":
            return {}
        from hooktuner_crepa.encoder import encode_clip, load_encoder

        if self._encoder is None:
            self._encoder = load_encoder(run, options.crepa_encoder)
            run.on_close(self._release)
        return {"patches": encode_clip(run, options, self._encoder, clip)}

    @hookimpl
    def intercept_blocks(self, run: Run, model: torch.nn.Module) -> BlockInterceptor:
        """Observes the aligned block, and the teacher where that is a block."""
        return self._session_of(run, model).observer

    @hookimpl
    def regularizer(self, run: Run, model: torch.nn.Module) -> Regularizer:
        """The alignment term and its projector; nothing where the weight is 0 in every step."""
        from hooktuner.technique import Regularizer

        from hooktuner_crepa.session import CrepaRegularizer

        session = self._session_of(run, model)
        return Regularizer() if session.options.inert else CrepaRegularizer(session)

    @hookimpl
    def on_event(self, run: Run, event: Event) -> None:
        """Free the encoder after caching; learn the length of the run and the similarity of each step."""
        if isinstance(event, RunStarted):
            for sentence in run.options_of(NAME, CrepaOptions).notes():
                run.note(sentence)
        elif isinstance(event, CachingFinished):
            self._release()
        elif isinstance(event, TrainingStarted) and self._session is not None:
            self._session.total = event.total_steps
        elif isinstance(event, StepFinished) and self._session is not None:
            self._session.finished(event.result)
        elif isinstance(event, RunEnded):
            self._session = None

    def _session_of(self, run: Run, model: torch.nn.Module) -> Session:
        from hooktuner_crepa.session import Session

        session = self._session
        if session is None or session.run is not run or session.model is not model:
            session = self._session = Session(run, run.options_of(NAME, CrepaOptions), model)
        return session

    def _release(self) -> None:
        """Drop the encoder and give its memory back."""
        if self._encoder is None:
            return
        import gc

        import torch

        self._encoder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
