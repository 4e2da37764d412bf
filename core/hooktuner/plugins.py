"""`PluginSet`: the active plugins of one run: choose, import, validate, order, call, close.

Installed is not active: only wanted plugins are imported (`discovery.py` lists what there is). One pluggy manager per
`PluginSet`, one set per run, nothing global. There is one typed method per hook; nothing else calls a plugin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

from hooktuner.discovery import (
    SPECS,
    HookCall,
    Plugin,
    catalogue,
    combines,
    find_plugin,
    installed_plugins,
    normal_name,
    plugin_from_object,
    wrong_answer,
)
from hooktuner.errors import PluginError
from hooktuner.hookspecs import PROJECT, HookSpecs
from hooktuner.technique import STAGES, BlockInterceptor, OffloadStrategy, Regularizer

if TYPE_CHECKING:
    import click
    import torch

    from hooktuner.config import PluginOptions
    from hooktuner.context import Run
    from hooktuner.events import Event
    from hooktuner.family import ModelCard, Part
    from hooktuner.step import Conditioning, Step
    from hooktuner.technique import Clip


@dataclass
class PluginSet:
    """The active plugins of one run, in the user's order, with one typed method per hook.

    Make it with `PluginSet.assemble`; `close()` unregisters everything.
    """

    plugins: tuple[Plugin, ...]
    _manager: pluggy.PluginManager = field(repr=False)
    _calls: dict[str, tuple[HookCall, ...]] = field(repr=False)

    @classmethod
    def assemble(cls, wanted: Iterable[Plugin]) -> PluginSet:
        """Import, validate and register the wanted plugins.

        The family comes first, then the others in the order given.
        Errors: `PluginError` for a broken plugin, a wrong hook, no family or two, two claimants of a hook that only
        one may answer (naming both distributions), a missing required hook. `check_needs` asks for capabilities once
        the card is known. A failed assembly leaves nothing registered.
        """
        plugins: list[Plugin] = []
        for plugin in wanted:
            if any(plugin is other for other in plugins):
                continue
            if any(plugin.name == other.name for other in plugins):
                raise PluginError(f"{plugin.name} — two plugins of this name are wanted. Give one another name.")
            if not plugin.implementations:
                raise PluginError(
                    f"{plugin.name} ({plugin.origin}) — answers no hook. Put @hooktuner.hookimpl above the methods "
                    "that answer hooks; `docs/hooks.md` lists them."
                )
            plugins.append(plugin)
        plugins.sort(key=lambda plugin: not plugin.is_family)
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(HookSpecs)
        calls: dict[str, list[HookCall]] = {hook: [] for hook in SPECS}
        for plugin in plugins:
            for hook, function in plugin.implementations.items():
                calls[hook].append(HookCall(plugin, hook, function))
            manager.register(plugin.target, name=plugin.name)
        manager.check_pending()
        _check_claims(plugins, calls)
        return cls(tuple(plugins), manager, {hook: tuple(found) for hook, found in calls.items()})

    def close(self) -> None:
        """Unregister every plugin; the set can no longer be called."""
        for plugin in self.plugins:
            if self._manager.has_plugin(plugin.name):
                self._manager.unregister(name=plugin.name)
        self._calls = dict.fromkeys(SPECS, ())

    @property
    def family(self) -> Plugin:
        """The model family of the run."""
        return next(plugin for plugin in self.plugins if plugin.is_family)

    def lock(self) -> dict[str, dict[str, str]]:
        """What ran: name → distribution and version, in the user's order. Written as `plugins.lock.json`."""
        return {
            plugin.name: {"distribution": plugin.distribution, "version": plugin.version} for plugin in self.plugins
        }

    def has(self, hook: str) -> bool:
        """Whether any active plugin answers `hook`."""
        return bool(self._calls[hook])

    def owner(self, hook: str) -> str | None:
        """The plugin that answers a slot or at-most-one hook."""
        return self._calls[hook][0].plugin.name if self._calls[hook] else None

    def check_needs(self, card: ModelCard) -> None:
        """Refuse techniques whose needs the family does not offer.

        Errors: `PluginError` naming the technique, the family, what is missing and what is offered.
        """
        for plugin in self.plugins:
            missing = sorted(plugin.needs - card.offers)
            if missing:
                offered = ", ".join(sorted(card.offers)) or "nothing"
                raise PluginError(
                    f"{plugin.name} ({plugin.origin}) — needs {', '.join(missing)} of a model, and {card.name} "
                    f"({self.family.origin}) does not offer that (it offers {offered}). Train without {plugin.name}."
                )

    # ------------------------------------------------------------------------------------------ hooks, in order

    def _one(self, hook: str, **arguments: Any) -> Any:
        return self._calls[hook][0](arguments)

    def _wrong(self, hook: str, answer: object, wanted: str) -> PluginError:
        return wrong_answer(self._calls[hook][0].plugin, hook, answer, wanted)

    def options(self) -> dict[str, type[PluginOptions]]:
        """Option models by plugin; each key owned once (checked by `hooktuner.config`)."""
        models = {plugin.name: plugin.option_model() for plugin in self.plugins}
        return {name: model for name, model in models.items() if model is not None}

    def describe_model(self, run: Run) -> ModelCard:
        """The family's card."""
        from hooktuner.family import ModelCard

        card = self._one("describe_model", run=run)
        if not isinstance(card, ModelCard):
            raise self._wrong("describe_model", card, "a hooktuner.family.ModelCard")
        return card

    def commands(self, group: click.Group) -> None:
        """Let every plugin add commands."""
        for call in self._calls["commands"]:
            call({"group": group})

    def load_model(self, run: Run, part: Part) -> Any:
        """One part of the model."""
        loaded = self._one("load_model", run=run, part=part)
        if loaded is None:
            raise self._wrong("load_model", loaded, f"the part {part.value!r}")
        return loaded

    def encode_text(self, run: Run, encoder: Any, captions: Sequence[str]) -> Sequence[Mapping[str, torch.Tensor]]:
        """Encoded captions, one mapping each."""
        encoded = self._one("encode_text", run=run, encoder=encoder, captions=captions)
        if not isinstance(encoded, Sequence) or len(encoded) != len(captions):
            raise self._wrong("encode_text", encoded, f"a sequence of {len(captions)} mappings, one per caption")
        return encoded

    def encode_latents(self, run: Run, vae: Any, pixels_BCFHW: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Encoded clips."""
        encoded = self._one("encode_latents", run=run, vae=vae, pixels_BCFHW=pixels_BCFHW)
        if not isinstance(encoded, Mapping) or "latents" not in encoded:
            raise self._wrong("encode_latents", encoded, 'a mapping with "latents"')
        return encoded

    def encode_features(self, run: Run, clip: Clip) -> dict[str, torch.Tensor]:
        """Features of all techniques, keys `<plugin>/<name>`."""
        features: dict[str, torch.Tensor] = {}
        for call in self._calls["encode_features"]:
            answer = call({"run": run, "clip": clip})
            if not isinstance(answer, Mapping):
                raise wrong_answer(call.plugin, "encode_features", answer, "a mapping of tensors")
            features.update({f"{call.plugin.name}/{name}": tensor for name, tensor in answer.items()})
        return features

    def offload_strategy(self, run: Run, model: torch.nn.Module) -> OffloadStrategy | None:
        """The technique's offload strategy, or None for core's default."""
        if not self.has("offload_strategy"):
            return None
        strategy = self._one("offload_strategy", run=run, model=model)
        if strategy is not None and not isinstance(strategy, OffloadStrategy):
            raise self._wrong("offload_strategy", strategy, "a hooktuner.OffloadStrategy")
        return strategy

    def intercept_blocks(self, run: Run, model: torch.nn.Module) -> list[tuple[str, BlockInterceptor]]:
        """(plugin, interceptor), outermost first: by stage, then in the user's order."""
        found: list[tuple[str, BlockInterceptor]] = []
        for call in self._calls["intercept_blocks"]:
            interceptor = call({"run": run, "model": model})
            if interceptor is None:
                continue
            if not isinstance(interceptor, BlockInterceptor) or interceptor.stage not in STAGES:
                raise wrong_answer(
                    call.plugin, "intercept_blocks", interceptor, f"a BlockInterceptor with a stage among {STAGES}"
                )
            found.append((call.plugin.name, interceptor))
        return sorted(found, key=lambda pair: STAGES.index(pair[1].stage))

    def regularizer(self, run: Run, model: torch.nn.Module) -> dict[str, Regularizer]:
        """Regularizers by plugin."""
        found: dict[str, Regularizer] = {}
        for call in self._calls["regularizer"]:
            answer = call({"run": run, "model": model})
            if answer is None:
                continue
            if not isinstance(answer, Regularizer):
                raise wrong_answer(call.plugin, "regularizer", answer, "a hooktuner.Regularizer")
            found[call.plugin.name] = answer
        return found

    def condition(self, run: Run, step: Step) -> Conditioning | None:
        """The latents that are given in this micro-batch, or None."""
        if not self._calls["condition"]:
            return None
        return self._one("condition", run=run, step=step)

    def prepare_input(self, run: Run, step: Step, predict: Any) -> Mapping[str, torch.Tensor] | None:
        """Replacements for the step's input, or None."""
        if not self._calls["prepare_input"]:
            return None
        return self._one("prepare_input", run=run, step=step, predict=predict)

    def predict(self, run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor:
        """The predicted velocity."""
        prediction = self._one("predict", run=run, denoiser=denoiser, step=step)
        if getattr(prediction, "shape", None) != step.noisy_BCFHW.shape:
            raise self._wrong("predict", prediction, f"a tensor of shape {tuple(step.noisy_BCFHW.shape)}")
        return prediction

    def compute_loss(self, run: Run, step: Step) -> torch.Tensor | None:
        """Per-sample losses, or None where core's default applies."""
        if not self._calls["compute_loss"]:
            return None
        loss_B = self._one("compute_loss", run=run, step=step)
        if getattr(loss_B, "shape", None) != (len(step.batch.index),):
            raise self._wrong("compute_loss", loss_B, f"a tensor of shape ({len(step.batch.index)},)")
        return loss_B

    def on_event(self, run: Run, event: Event) -> None:
        """Tell every plugin."""
        for call in self._calls["on_event"]:
            call({"run": run, "event": event})


def _check_claims(plugins: Sequence[Plugin], calls: Mapping[str, Sequence[HookCall]]) -> None:
    families = [plugin for plugin in plugins if plugin.is_family]
    if not families:
        raise PluginError(
            'model_family — no model family is active. Set "model_family" in the config or name one with --plugin; '
            "`tuner plugins` lists those that are installed."
        )
    if len(families) > 1:
        named = " and ".join(f"{plugin.name} ({plugin.origin})" for plugin in families)
        raise PluginError(f"model_family — a run has one model family, and two are wanted: {named}. Remove one.")
    for hook, claims in calls.items():
        mode = combines(hook)
        if mode == "slot":
            for claim in claims:
                if claim.plugin is not families[0]:
                    raise PluginError(
                        f"{claim.plugin.name} ({claim.plugin.origin}) — hook {hook} belongs to the model family, and "
                        f"{families[0].name} ({families[0].origin}) fills it. A technique cannot implement it."
                    )
            if SPECS[hook].required and not claims:  # type: ignore[attr-defined]
                raise PluginError(
                    f"{families[0].name} ({families[0].origin}) — a model family must implement the hook {hook}."
                )
        if mode == "at_most_one" and len(claims) > 1:
            named = " and ".join(f"{claim.plugin.name} ({claim.plugin.origin})" for claim in claims)
            raise PluginError(f"{hook} — only one plugin may answer this hook, and {named} both do. Remove one.")


__all__ = [
    "Plugin",
    "PluginSet",
    "catalogue",
    "combines",
    "find_plugin",
    "installed_plugins",
    "normal_name",
    "plugin_from_object",
]
