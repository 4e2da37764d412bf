"""The training kernel: the one place where the batch, the model and the techniques meet.

    batch → draw (σ, noise) → condition → noised input → [prepare_input] → predict (family, through the block runner)
          → compute_loss (per sample, masked) + Σ regularizer terms → scale → backward → finite? → clip → optimizer

The kernel never waits for the device: numbers travel to the host behind the next step (`PendingResult`), and a step
whose loss or gradient is not finite is skipped on the device itself, together with every later one, until its numbers
have arrived and the run is stopped with the names of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hooktuner import flow
from hooktuner.context import Run
from hooktuner.errors import NonFiniteLossError, PluginError
from hooktuner.plugins import PluginSet
from hooktuner.randomness import derive_seed
from hooktuner.step import Batch, Step, StepResult
from hooktuner.technique import OffloadStrategy, Regularizer
from hooktuner.train.adapters import Trainables
from hooktuner.train.blocks import BlockRunner
from hooktuner.train.engine import Engine
from hooktuner.train.precision import autocast

FLOW_TERM = "flow"


@dataclass
class PendingResult:
    """A finished step whose numbers may still be on their way from the device."""

    number: int
    epoch: int
    learning_rate: float
    terms: tuple[str, ...]
    samples: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None
    metrics: tuple[str, ...] = ()
    stop: bool = False
    """Whether any process was asked to stop before this step; known after `wait`."""

    def wait(self) -> StepResult:
        """The numbers. Errors: `NonFiniteLossError` naming step and samples."""
        if self.arrived is not None:
            self.arrived.synchronize()
        stop, grad_norm, *values = self.values.tolist()
        self.stop = stop > 0
        terms = dict(zip(self.terms, values[: len(self.terms)], strict=True))
        metrics = dict(zip(self.metrics, values[len(self.terms) :], strict=True))
        loss = sum(terms.values())
        result = StepResult(self.number, self.epoch, loss, terms, self.learning_rate, grad_norm, self.samples, metrics)
        if not torch.isfinite(self.values).all():
            numbers = {**{f"loss/{name}": value for name, value in terms.items()}, **metrics}
            broken = [f"{name} = {value}" for name, value in numbers.items() if not _finite(value)]
            what = ", ".join(broken) or f"the gradient norm is {grad_norm}"
            raise NonFiniteLossError(
                f"step {self.number} — {what}; the optimizer has not moved since step {self.number - 1}. Samples: "
                f"{', '.join(self.samples)}. Look at these clips, lower learning_rate, or use mixed_precision no; "
                "the last checkpoint is untouched."
            )
        return result


def _finite(value: float) -> bool:
    return value - value == 0


class Kernel:
    """Everything an optimizer step needs. `denoiser` is called through `model` (the distributed wrapper, if any)."""

    def __init__(
        self,
        run: Run,
        plugins: PluginSet,
        engine: Engine,
        denoiser: nn.Module,
        runner: BlockRunner,
        regularizers: Mapping[str, Regularizer],
        trainables: Trainables,
        optimizer: torch.optim.Optimizer,
        offload: OffloadStrategy | None = None,
    ) -> None:
        assert run.compute_dtype is not None
        self.run = run
        self.plugins = plugins
        self.engine = engine
        self.denoiser = denoiser
        self.model = engine.distribute(denoiser)
        self.runner = runner
        self.regularizers = regularizers
        self.trainables = trainables
        self.optimizer = optimizer
        self.offload = offload
        self._compute_dtype = run.compute_dtype
        self._parameters = list(trainables.named().values())
        self._step_seeds = run.config.lora_dropout > 0
        # A step is skipped on the device where the optimizer can do that, else after asking the device.
        self._skips_on_device = engine.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        self._broken = torch.zeros((), device=engine.device)

    # ------------------------------------------------------------------------------------------- one micro-batch

    def draw(self, batch: Batch, number: int, micro: int) -> Step:
        """The step of a batch before the prediction, after `condition` and `prepare_input`."""
        step = draw(self.run, self.plugins, batch, number=number, micro=micro)
        if self.plugins.has("prepare_input"):
            self._prepare_input(step)
        return step

    def _prepare_input(self, step: Step) -> None:
        def predict(noisy_BCFHW: Tensor, sigma_B: Tensor) -> Tensor:
            other = replace(step, noisy_BCFHW=noisy_BCFHW, sigma_B=sigma_B, timestep_B=flow.timestep(sigma_B), notes={})
            _give(other)
            dropout = _no_dropout(self.denoiser) if self._step_seeds else nullcontext()
            with torch.no_grad(), dropout, autocast(self.engine.device, self._compute_dtype):
                return self.plugins.predict(self.run, self.denoiser, other).float()

        replaced = self.plugins.prepare_input(self.run, step, predict)
        if replaced is None:
            return
        for name, value in replaced.items():
            if name not in ("noisy_BCFHW", "sigma_B", "target_BCFHW") or value.shape != getattr(step, name).shape:
                raise PluginError(
                    f"{self.plugins.owner('prepare_input')} — hook prepare_input answered {name!r} of shape "
                    f"{tuple(value.shape)}; it may replace noisy_BCFHW, sigma_B and target_BCFHW in their shapes."
                )
            setattr(step, name, value)
        step.timestep_B = flow.timestep(step.sigma_B)
        _give(step)

    def predict(self, step: Step) -> Tensor:
        """The velocity with gradients, float32."""
        with autocast(self.engine.device, self._compute_dtype):
            return self.plugins.predict(self.run, self.model, step).float()

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Every loss term of a predicted step as a scalar, by name; their sum is what is minimised."""
        loss_B = self.plugins.compute_loss(self.run, step)
        if loss_B is None:
            assert step.prediction_BCFHW is not None
            loss_B = flow.mean_squared_error(step.prediction_BCFHW, step.target_BCFHW, step.weight_B1FHW)
        step.loss_B = loss_B
        terms = {FLOW_TERM: loss_B.mean()}
        for plugin, regularizer in self.regularizers.items():
            for name, value in regularizer.terms(step).items():
                terms[f"{plugin}/{name}" if name else plugin] = value
        return terms

    # -------------------------------------------------------------------------------------- one optimizer step

    def step(
        self,
        number: int,
        epoch: int,
        learning_rate: float,
        micros: Sequence[tuple[int, Batch]],
        samples: int,
        *,
        stop: bool = False,
    ) -> PendingResult:
        """One optimizer step from this process's micro-batches.

        `samples` is the number of samples in the whole step over all processes: every sample weighs the same,
        whatever micro-batch it is in. `stop` is this process's wish to stop after the step; all processes learn of it
        together. Raises nothing for a non-finite loss: `PendingResult.wait` does.
        """
        while True:
            try:
                terms, metrics = self._accumulate(number, micros, samples)
                break
            except torch.OutOfMemoryError:  # nothing has moved yet: the same step can be done again
                self.optimizer.zero_grad(set_to_none=True)
                if self.offload is None or not self.offload.out_of_memory():
                    raise
        self._average_gradients()
        grad_norm = self._clip()
        wish = self._broken.new_ones(()) if stop else self._broken.new_zeros(())
        values = self.engine.average(torch.stack([wish, grad_norm, *terms.values(), *metrics.values()]))
        self._optimize(values, learning_rate)
        keys = tuple(key for _, batch in micros for key in batch.keys)
        return self._send(PendingResult(number, epoch, learning_rate, tuple(terms), keys, values, None, tuple(metrics)))

    def _accumulate(
        self, number: int, micros: Sequence[tuple[int, Batch]], samples: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward of every micro-batch; loss terms and metrics, each weighted by its samples, detached."""
        totals: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        for position, (micro, batch) in enumerate(micros):
            batch = batch.to(self.engine.device)
            last = position == len(micros) - 1
            weight = len(batch.index) * self.engine.world / samples  # gradients are averaged over processes
            if self._step_seeds:  # dropout inside the model is the only user of torch's global stream
                torch.manual_seed(derive_seed(self.run.config.seed, "dropout", micro))
            step = self.draw(batch, number, micro)
            with self.runner.during(step):
                if last:
                    numbers = self._forward_backward(step, weight)
                else:
                    with self.engine.unsynchronised(self.model):
                        numbers = self._forward_backward(step, weight)
            for total, mine in zip(totals, numbers, strict=True):
                for name, value in mine.items():
                    value = value.detach().float() * weight
                    total[name] = total[name] + value if name in total else value
        return totals

    def _forward_backward(self, step: Step, weight: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        step.prediction_BCFHW = self.predict(step)
        terms = self.losses(step)
        loss = torch.stack([value.float() for value in terms.values()]).sum() if len(terms) > 1 else terms[FLOW_TERM]
        metrics = {
            f"{plugin}/{name}": value
            for plugin, regularizer in self.regularizers.items()
            for name, value in regularizer.metrics(step).items()
        }
        (loss * weight if weight != 1.0 else loss).backward()
        return terms, metrics

    def _average_gradients(self) -> None:
        """Over processes, for modules of regularizers: the distributed wrapper averages the denoiser's only."""
        if self.engine.world > 1:
            for group, parameters in self.trainables.groups.items():
                for parameter in parameters.values() if group != "denoiser" else ():
                    if parameter.grad is not None:
                        parameter.grad = self.engine.average(parameter.grad)

    def _clip(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = self.run.config.max_grad_norm
        if limit > 0 and self.run.config.grad_clip_method == "norm":
            torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        elif limit > 0:
            torch.nn.utils.clip_grad_value_(self._parameters, limit)
        return norm.to(self.engine.device)

    def _optimize(self, values: Tensor, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        broken = (~torch.isfinite(values).all()).float()
        self._broken = torch.maximum(self._broken, broken)  # sticky: nothing moves after a broken step
        if self._skips_on_device:
            optimizer: Any = self.optimizer
            optimizer.grad_scale, optimizer.found_inf = None, self._broken
            optimizer.step()
        elif not self._broken.item():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @staticmethod
    def _send(result: PendingResult) -> PendingResult:
        """The result with its values on their way to the host."""
        if result.values.device.type == "cuda":
            host = torch.empty(result.values.shape, dtype=result.values.dtype, pin_memory=True)
            result.values = host.copy_(result.values, non_blocking=True)
            result.arrived = torch.cuda.Event()
            result.arrived.record()
        return result


def draw(run: Run, plugins: PluginSet, batch: Batch, *, number: int = 1, micro: int = 0) -> Step:
    """The step of a batch: noised input and target, and given latents put in their places (`condition`)."""
    step = Step(
        number=number,
        micro=micro,
        batch=batch,
        sigma_B=batch.sigma_B,
        timestep_B=flow.timestep(batch.sigma_B),
        noisy_BCFHW=flow.interpolate(batch.latents_BCFHW, batch.noise_BCFHW, batch.sigma_B),
        target_BCFHW=flow.velocity(batch.latents_BCFHW, batch.noise_BCFHW),
    )
    step.conditioning = plugins.condition(run, step)
    _give(step)
    return step


def _give(step: Step) -> None:
    """Put given latents into the noised input."""
    if step.conditioning is not None:
        given = step.conditioning.given_B1FHW
        step.noisy_BCFHW = torch.where(given, step.conditioning.latents_BCFHW.to(step.noisy_BCFHW), step.noisy_BCFHW)


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """The model as it samples: without dropout, which would also move torch's global stream."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
