"""The only module that meets accelerate: devices, processes, gradient synchronisation, trackers.

Autocast is ours (`precision.py`), not accelerate's: accelerate keeps its precision in process-wide singletons, so two
runs in one Python process could not differ, and it patches the model's `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hooktuner.config import RunConfig


class Engine:
    """One process's view of the devices: `device`, `rank`, `world`."""

    def __init__(self, config: RunConfig) -> None:
        trackers: list[Any] = [] if config.report_to == "none" else [config.report_to]
        self._accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # otherwise CPU processes would train without each other
            mixed_precision="no",
            log_with=trackers or None,
            project_dir=str(Path(config.output_dir) / "trackers") if trackers else None,
            step_scheduler_with_optimizer=False,
        )
        self._tracking = bool(trackers)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self._accelerator.is_main_process

    def wait(self) -> None:
        """A barrier over all processes."""
        self._accelerator.wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does the body first; the others then find its files."""
        with self._accelerator.main_process_first():
            yield

    def distribute(self, model: nn.Module) -> nn.Module:
        """The model as it must be called while training: itself, or wrapped for several processes."""
        if self.world == 1:
            return model
        return self._accelerator.prepare_model(model, device_placement=False)

    def unsynchronised(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients of backward passes in this context are not yet averaged over processes."""
        return self._accelerator.no_sync(model) if self.world > 1 else nullcontext()

    def average(self, values: Tensor) -> Tensor:
        """The mean of a small tensor over all processes."""
        if self.world == 1:
            return values
        return self._accelerator.reduce(values, reduction="mean")  # type: ignore[return-value]

    def start_trackers(self, config: RunConfig) -> None:
        """Open the configured trackers."""
        if self._tracking:
            values = {key: value for key, value in config.model_dump().items() if isinstance(value, int | float | str)}
            name = config.tracker_run_name or Path(config.output_dir).name
            self._accelerator.init_trackers(f"{config.tracker_project_name}-{name}", config=values)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers to the trackers."""
        if self._tracking:
            self._accelerator.log(dict(values), step=step)

    def close(self) -> None:
        """Close trackers; processes leave together."""
        if self._tracking:
            self._accelerator.end_training()
        self._accelerator.free_memory()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a distributed wrapper, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
