"""`Run`: what every hook is given. One object per run, nothing global."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hooktuner.errors import PluginError
from hooktuner.family import Flavour, ModelCard

if TYPE_CHECKING:
    import torch

    from hooktuner.config import PluginOptions, RunConfig

    Options = TypeVar("Options", bound=PluginOptions)


@dataclass
class Run:
    """The configuration and surroundings of one run. Hooks read it; only core assigns to it.

    `options` holds the validated options of every active plugin by plugin name. `card` is None only while the
    family describes itself. `device` and the dtypes are set before the first part of the model is loaded.
    """

    config: RunConfig
    options: Mapping[str, PluginOptions] = field(default_factory=dict)
    card: ModelCard | None = None
    datasets: Sequence[Any] = ()
    """The parsed entries of `data_backend_config` (`hooktuner.data.datasets`)."""
    model_path: Path | str | None = None
    """Folder or hub id of the checkpoint in the diffusers layout."""
    device: torch.device | None = None
    weight_dtype: torch.dtype | None = None
    """In which dtype the denoiser's weights are loaded."""
    compute_dtype: torch.dtype | None = None
    """The autocast dtype; equals `weight_dtype` where autocast is off."""
    anatomy: Any | None = None
    """The `Anatomy` of the denoiser, where the family has one; set once the denoiser is loaded."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the start report."""
    _undos: list[Callable[[], object]] = field(default_factory=list, repr=False)

    @property
    def flavour(self) -> Flavour:
        """The chosen flavour of the family."""
        if self.card is None:
            raise RuntimeError("run.flavour is not known while the family describes itself; read run.config instead")
        return self.card.flavours[self.config.model_flavour or self.card.default_flavour]

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)

    def options_of(self, plugin: str, kind: type[Options]) -> Options:
        """The options of an active plugin, checked to be of `kind`: `run.options_of("my-plugin", MyOptions)`."""
        found = self.options.get(plugin)
        if not isinstance(found, kind):
            raise PluginError(f"{plugin} — its options are {type(found).__name__}, not {kind.__name__}.")
        return found

    def note(self, sentence: str) -> None:
        """Add a sentence to the start report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Call `undo` when the run closes, in reverse order, also after an error."""
        self._undos.append(undo)

    def close(self) -> None:
        """Run every undo once; all of them run, and failures are gathered into one exception."""
        failures: list[Exception] = []
        while self._undos:
            try:
                self._undos.pop()()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise ExceptionGroup("closing the run failed", failures)
