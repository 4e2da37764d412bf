"""The hooks: the whole contract between core and plugins (API 1, entry-point group `hooktuner.plugins.v1`).

A plugin is an object or a class (core makes one instance per run) whose methods carry `@hooktuner.hookimpl`:

    class Loud:
        @hookimpl
        def on_event(self, run, event):
            print(event)

An implementation names the arguments that it wants, in any order, without defaults, `*args` or `**kwargs`.

How answers combine is declared by the decorator of each spec:

    slot        the family of the run, chosen by name, answers; nobody else may implement it
    at_most_one no or one active plugin answers; core has a default where it says so
    union       every active plugin may answer; each answer is kept under its owner's name
    nested      every answer wraps the next, by declared stage, then in the order the user wrote
    each        every plugin is told; answers are ignored

Plugins are called family first, then in the order in which the user wrote them (`--plugin`, then the config's
`plugins`, then those that config keys switched on). An exception in a plugin keeps its traceback and gains a note
with plugin, version and hook. An answer of another type than the spec's annotation is an error that names the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import pluggy

if TYPE_CHECKING:
    import click
    import torch

    from hooktuner.config import PluginOptions
    from hooktuner.context import Run
    from hooktuner.events import Event
    from hooktuner.family import ModelCard, Part
    from hooktuner.step import Conditioning, Step
    from hooktuner.technique import BlockInterceptor, Clip, OffloadStrategy, Regularizer

API = 1
GROUP = f"hooktuner.plugins.v{API}"
PROJECT = "hooktuner"

Combine = Literal["slot", "at_most_one", "union", "nested", "each"]
Function = TypeVar("Function")

hookimpl = pluggy.HookimplMarker(PROJECT)
_hookspec = pluggy.HookspecMarker(PROJECT)


def _spec(combines: Combine, *, required: bool = False, hot: bool = False) -> Any:
    """Mark a function as a hook spec and record how answers combine.

    required: a family must implement it. hot: called in every step, so a façade call must stay cheap.
    """

    def mark(function: Function) -> Function:
        vars(function).update(combines=combines, required=required, hot=hot)
        return _hookspec(function)  # type: ignore[call-overload]

    return mark


class HookSpecs(Protocol):
    """Every hook, in the order of one run."""

    # ------------------------------------------------------------------------------------------ before the run

    @_spec("union")
    def options(self) -> type[PluginOptions]:
        """The config keys that the plugin owns, as a subclass of `PluginOptions`.

        When: to read a config, also for installed plugins that turn out not to be wanted; must not import torch.
        Returns: a pydantic model class. Each field is a config key, flat, unique among core and all plugins, with a
        description that names its unit. Two owners of one key are an error that names both.
        """
        ...

    @_spec("slot", required=True)
    def describe_model(self, run: Run) -> ModelCard:
        """The family's card: flavours, defaults, frame and size rules, LoRA targets, offered capabilities.

        When: after the plugins are chosen and before the config is complete; `run.config` has only what the user
        wrote (`None` for keys with family defaults) and `run.card` is None. Must not import torch or read weights.
        Receives: `run`. Returns: a `ModelCard`; the run's defaults come from it.
        Errors: `ModelError` for a flavour that cannot be used (an unknown flavour is refused by core).
        """
        ...

    @_spec("union")
    def commands(self, group: click.Group) -> None:
        """Add commands to `tuner`.

        When: for `tuner --help`, and to look for a command that core does not have; asked of every installed plugin.
        Must not import torch. One that fails, or whose name is taken, is left out with a note.
        Receives: a click group to add to. Returns nothing.
        """
        ...

    # -------------------------------------------------------------------------------------------- before step 1

    @_spec("slot", required=True)
    def load_model(self, run: Run, part: Part) -> Any:
        """Load one part of the model from `run.model_path`.

        When: text encoder while captions are encoded, then the VAE while clips are encoded, then the denoiser; each
        is released before the next is loaded. The sampling pipeline is loaded for validation only.
        Returns: for `Part.DENOISER` the unmodified `torch.nn.Module` of diffusers on the CPU, in
        `run.weight_dtype` except for modules the model keeps in fp32; for `Part.PIPELINE` a `SamplingPipeline`
        (without text encoders and denoiser); for `Part.TEXT_ENCODER` and `Part.VAE` whatever the family's own
        `encode_text` and `encode_latents` want, on `run.device`.
        Errors: `ModelError` naming the folder or hub id, why, and what to do.
        """
        ...

    @_spec("slot", required=True)
    def encode_text(self, run: Run, encoder: Any, captions: Sequence[str]) -> Sequence[Mapping[str, torch.Tensor]]:
        """Encode captions into the tensors that `predict` and sampling need.

        When: once per distinct caption, also "" (caption dropout) and validation prompts; under `no_grad`.
        Receives: `encoder` from `load_model(run, Part.TEXT_ENCODER)`; captions as written, not cleaned.
        Returns: one mapping per caption, each exactly what the caption gets when encoded alone: valid tokens only,
        no batch axis, e.g. `{"qwen_LD": (L, 3584), "clip_D": (768,)}`. Cached as safetensors.
        """
        ...

    @_spec("slot", required=True)
    def encode_latents(self, run: Run, vae: Any, pixels_BCFHW: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Encode clips into latents, scaled as the denoiser expects them.

        When: once per view of a clip, under `no_grad`.
        Receives: `vae` from `load_model(run, Part.VAE)`; pixels in [−1, 1], float32, on `run.device`; frames obey
        the card's frame rule, height and width its size multiple.
        Returns: `latents` (B, C, F, H, W), plus whatever else conditions a sample (`first_latent` …), each with a
        batch axis. Cached per sample as safetensors, then stacked into `Batch.extras`.
        """
        ...

    @_spec("union")
    def encode_features(self, run: Run, clip: Clip) -> Mapping[str, torch.Tensor]:
        """Further features to cache per clip view, such as those of a teacher network.

        When: once per view, after the VAE is released, under `no_grad`. The plugin loads its network at the first
        call and releases it at the event `CachingFinished`.
        Receives: the `Clip` as it was encoded: frames uint8 (F, height, width, 3) and the latents' shape.
        Returns: tensors without batch axis; core caches them under `<plugin>/<name>` with the plugin's version and
        those of its options that `PluginOptions.cache_fields["features"]` names in the key.
        """
        ...

    @_spec("at_most_one")
    def offload_strategy(self, run: Run, model: torch.nn.Module) -> OffloadStrategy:
        """Where weights live, and how they get to a block in time.

        When: once, after adapters are added. Core's default moves everything to `run.device`.
        Returns: an `OffloadStrategy`; core calls `place()` once, `out_of_memory()` when a step did not fit (and
        repeats the step if it made room), `report()` after each step, and `close()` at the end of the run.
        """
        ...

    @_spec("nested")
    def intercept_blocks(self, run: Run, model: torch.nn.Module) -> BlockInterceptor:
        """Wrap the calls of the denoiser's blocks.

        When: once, after the model is placed. Needs the capability `blocks`.
        Returns: a `BlockInterceptor`. Stages nest as route ⊃ observe ⊃ (checkpoint) ⊃ reside: what routes and
        observes runs outside the recomputed region, once per forward; what moves weights runs inside it.
        Only calls with gradients are intercepted; sampling is not.
        """
        ...

    @_spec("union")
    def regularizer(self, run: Run, model: torch.nn.Module) -> Regularizer:
        """Loss terms besides the family's, with the modules and state they need.

        When: once, after adapters are added. Returns: a `Regularizer`; its terms appear as `loss/<plugin>` or
        `loss/<plugin>/<term>`, its modules join the optimizer, its state is saved in checkpoints and restored, and
        nothing of it is exported.
        """
        ...

    # ---------------------------------------------------------------------------------------------- in the step

    @_spec("slot", hot=True)
    def condition(self, run: Run, step: Step) -> Conditioning | None:
        """Which latents of this micro-batch are given instead of generated (a clean first frame …).

        When: after the draw, before `prepare_input`. Core puts the given latents into the noised input, again after
        `prepare_input`, and takes them out of the loss.
        Returns: a `Conditioning`, or None. Random decisions must use `hooktuner.randomness` with
        `step.batch.index`.
        """
        ...

    @_spec("at_most_one", hot=True)
    def prepare_input(self, run: Run, step: Step, predict: Any) -> Mapping[str, torch.Tensor] | None:
        """Replace the noised input before the prediction, for instance by a rollout of the model itself.

        When: after `condition`. Receives: the step, and `predict(noisy_BCFHW, sigma_B)` → velocity_BCFHW without
        gradients and without dropout, conditioning included.
        Returns: None to leave the step alone, or a mapping with any of `noisy_BCFHW`, `sigma_B`, `target_BCFHW`
        (same shapes, float32). Must have no effect on random streams.
        """
        ...

    @_spec("slot", required=True, hot=True)
    def predict(self, run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor:
        """The denoiser's velocity for the step's noised input.

        When: once per micro-batch with gradients under autocast; also for rollouts without gradients.
        Receives: the live denoiser (call it, do not keep it); `step.noisy_BCFHW`, `step.timestep_B`,
        `step.batch.text`, `step.conditioning`.
        Returns: velocity (B, C, F, H, W), the shape of `step.target_BCFHW`. Accumulation, precision, clipping and
        logging are never its business. The caption of one sample must not change the answer for another.
        """
        ...

    @_spec("at_most_one", hot=True)
    def compute_loss(self, run: Run, step: Step) -> torch.Tensor:
        """The loss of each sample from `step.prediction_BCFHW` and `step.target_BCFHW`.

        When: after `predict`. Core's default is the mean squared error over all elements that are not given.
        Returns: shape (B,), float32, differentiable; core averages it. `step.weight_B1FHW` (or None) says which
        elements count.
        """
        ...

    # ---------------------------------------------------------------------------------------------- all along

    @_spec("each")
    def on_event(self, run: Run, event: Event) -> None:
        """Be told what happened: one of the classes in `hooktuner.events`. Cheap for events nobody handles."""
        ...
