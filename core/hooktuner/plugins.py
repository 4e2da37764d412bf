"""Plugins: list what is installed, choose by name, import, validate, order, call, close.

Installed is not active: only wanted plugins are imported (and, to learn who owns a config key, the light entry
modules of the others, one by one). One pluggy manager per `PluginSet`, one set per run, nothing global.
`PluginSet` has one typed method per hook; nothing else calls a plugin.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from hooktuner.errors import HooktunerError, PluginError, did_you_mean
from hooktuner.hookspecs import API, GROUP, PROJECT, Combine, HookSpecs
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

SPECS: Mapping[str, Callable[..., Any]] = {
    name: function for name, function in vars(HookSpecs).items() if hasattr(function, "combines")
}
"""Every hook spec by name, in the order of a run."""


def normal_name(name: str) -> str:
    """Plugin names as users may type them: any case, underscores for hyphens."""
    return name.strip().lower().replace("_", "-")


def combines(hook: str) -> Combine:
    """How the answers of a hook combine."""
    return SPECS[hook].combines  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------- what there is


@dataclass
class Plugin:
    """A plugin that is installed or was handed in as an object. `target` is set once it is imported."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint | None = None
    target: Any = None

    @property
    def origin(self) -> str:
        """`hooktuner-name 0.1.0`, for messages."""
        return f"{self.distribution} {self.version}"

    def load(self) -> Any:
        """Import the plugin and return its object (an instance, where the entry point is a class).

        Errors: `PluginError` naming plugin, distribution, entry point and the reason.
        """
        if self.target is None:
            assert self.entry_point is not None
            try:
                loaded = self.entry_point.load()
                self.target = loaded() if inspect.isclass(loaded) else loaded
            except Exception as failure:
                raise PluginError(
                    f"{self.name} ({self.origin}, {self.entry_point.value}) — cannot be imported: "
                    f"{type(failure).__name__}: {failure}. Reinstall or update {self.distribution}, or run without it."
                ) from failure
        return self.target

    @cached_property
    def implementations(self) -> dict[str, Callable[..., Any]]:
        """The hook implementations of the loaded plugin, by hook name, checked against the specs."""
        return dict(_implementations(self))

    @property
    def is_family(self) -> bool:
        """Whether the plugin is a model family (it describes a model)."""
        return "describe_model" in self.implementations

    @property
    def needs(self) -> frozenset[str]:
        """Capabilities that a technique needs of a family (`needs` of the plugin's class)."""
        return frozenset(getattr(self.target, "needs", ()))

    @property
    def aliases(self) -> frozenset[str]:
        """Further names that users may type (`aliases` of the plugin's class)."""
        return frozenset(normal_name(alias) for alias in getattr(self.target, "aliases", ()))

    def option_model(self) -> type[PluginOptions] | None:
        """The plugin's option model, or None where it owns no keys."""
        from hooktuner.config import PluginOptions

        if "options" not in self.implementations:
            return None
        model = _Call(self, "options", self.implementations["options"], ())({})
        if not (inspect.isclass(model) and issubclass(model, PluginOptions)):
            raise _wrong_answer(self, "options", model, "a subclass of hooktuner.PluginOptions")
        return model


def installed_plugins() -> list[Plugin]:
    """Every plugin that is installed, sorted by name, not imported. Two distributions with one name are an error."""
    found: dict[str, Plugin] = {}
    for entry_point in entry_points(group=GROUP):
        distribution = entry_point.dist
        plugin = Plugin(
            name=normal_name(entry_point.name),
            distribution=distribution.name if distribution else "unknown",
            version=distribution.version if distribution else "unknown",
            entry_point=entry_point,
        )
        other = found.get(plugin.name)
        if other and other.distribution != plugin.distribution:
            raise PluginError(
                f"{plugin.name} — two installed distributions provide a plugin of this name: {other.origin} and "
                f"{plugin.origin}. Uninstall one of them."
            )
        found[plugin.name] = plugin
    return [found[name] for name in sorted(found)]


def catalogue() -> dict[str, dict[str, Any]]:
    """Published plugins by name, with the config keys they own, from installed catalogues.

    Core knows no plugin by name; what could be installed is data that catalogue packages bring (entry-point group
    `hooktuner.catalogue.v1`, a mapping of plugin name to `distribution`, `kind`, `summary`, `keys`).
    """
    merged: dict[str, dict[str, Any]] = {}
    for entry_point in entry_points(group="hooktuner.catalogue.v1"):
        try:
            merged.update(entry_point.load())
        except Exception as failure:  # a broken catalogue only costs its suggestions
            merged.setdefault("", {"failures": []}).setdefault("failures", []).append(f"{entry_point.value}: {failure}")
    merged.pop("", None)
    return merged


def plugin_from_object(target: Any, *, name: str | None = None) -> Plugin:
    """Wrap an object or class of the user's own as a plugin. Its name is `name`, its `name` attribute, or its class's
    name in hyphens."""
    if inspect.isclass(target):
        target = target()
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(target).__name__)
    return Plugin(
        name=normal_name(name or getattr(target, "name", None) or words),
        distribution=type(target).__module__,
        version="(object)",
        target=target,
    )


def find_plugin(name: str, installed: Sequence[Plugin]) -> Plugin:
    """The installed plugin of this name or alias.

    Errors: `PluginError` with the nearest name, or with the `pip install` line where a catalogue knows it.
    """
    wanted = normal_name(name)
    for plugin in installed:
        if plugin.name == wanted:
            return plugin
    for plugin in installed:  # aliases live in the light entry modules
        try:
            plugin.load()
        except PluginError:
            continue
        if wanted in plugin.aliases:
            return plugin
    known = catalogue().get(wanted)
    if known:
        raise PluginError(
            f"{name} — this plugin is not installed. Install it with: pip install {known['distribution']}"
        )
    names = [plugin.name for plugin in installed]
    have = f"Installed: {', '.join(names)}." if names else "No plugin is installed."
    raise PluginError(" ".join(f"{name} — no plugin of this name is installed. {did_you_mean(wanted, names)} {have}".split()))


# ---------------------------------------------------------------------------------------------------- validation


def _implementations(plugin: Plugin) -> Iterator[tuple[str, Callable[..., Any]]]:
    target = plugin.load()
    for name in dir(target):
        if name.startswith("__"):
            continue
        function = inspect.getattr_static(target, name)
        marked = getattr(function, f"{PROJECT}_impl", None)
        if marked is None:
            continue
        hook = marked.get("specname") or name
        if hook not in SPECS:
            raise PluginError(
                f"{plugin.name} ({plugin.origin}) — there is no hook {hook!r}. {did_you_mean(hook, SPECS)} "
                f"See `docs/hooks.md` for all hooks of API {API}."
            )
        if any(marked.get(option) for option in ("tryfirst", "trylast", "hookwrapper", "wrapper")):
            raise PluginError(
                f"{plugin.name} ({plugin.origin}) — hook {hook}: tryfirst, trylast and wrappers are not allowed. "
                "The user's order decides; say how answers nest with a stage where the hook has one."
            )
        bound = getattr(target, name)
        _check_signature(plugin, hook, bound)
        yield hook, bound


def _check_signature(plugin: Plugin, hook: str, function: Callable[..., Any]) -> None:
    allowed = [name for name in inspect.signature(SPECS[hook]).parameters if name != "self"]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            raise PluginError(
                f"{plugin.name} ({plugin.origin}) — hook {hook}: parameter {parameter.name!r} has a default, or is "
                f"keyword-only, or collects others; pluggy would not fill it. Use plain parameters among "
                f"({', '.join(allowed)})."
            )
        if parameter.name not in allowed:
            raise PluginError(
                f"{plugin.name} ({plugin.origin}) — hook {hook} has no argument {parameter.name!r}. "
                f"{did_you_mean(parameter.name, allowed)} It receives ({', '.join(allowed)})."
            )


def _wrong_answer(plugin: Plugin, hook: str, answer: object, wanted: str) -> PluginError:
    return PluginError(
        f"{plugin.name} ({plugin.origin}) — hook {hook} answered {_describe(answer)}; it must return {wanted}. "
        "This is a mistake in the plugin: report it to its author."
    )


def _describe(answer: object) -> str:
    shape = getattr(answer, "shape", None)
    return f"{type(answer).__name__} of shape {tuple(shape)}" if shape is not None else f"{type(answer).__name__}"


def _argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


# ------------------------------------------------------------------------------------------------------ the set


@dataclass
class _Call:
    """One implementation, ready to be called: argument names are looked up once, not per step."""

    plugin: Plugin
    hook: str
    function: Callable[..., Any]
    names: tuple[str, ...]

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        try:
            return self.function(*[arguments[name] for name in self.names])
        except Exception as failure:
            failure.add_note(f"raised by plugin {self.plugin.name} ({self.plugin.origin}) in hook {self.hook}")
            raise


@dataclass
class PluginSet:
    """The active plugins of one run, in the user's order, with one typed method per hook.

    Make it with `PluginSet.assemble`; `close()` unregisters everything.
    """

    plugins: tuple[Plugin, ...]
    _manager: pluggy.PluginManager = field(repr=False)
    _calls: dict[str, tuple[_Call, ...]] = field(repr=False)

    @classmethod
    def assemble(cls, wanted: Iterable[Plugin]) -> PluginSet:
        """Import, validate and register the wanted plugins.

        Errors: `PluginError` for a broken plugin, a wrong hook, no family or two, two claimants of a hook that only
        one may answer (naming both distributions), a missing required hook, or a capability nobody offers is checked
        later by `check_needs`. A failed assembly leaves nothing registered.
        """
        plugins: list[Plugin] = []
        for plugin in wanted:
            if any(plugin.name == other.name and plugin.target is other.target for other in plugins):
                continue
            if any(plugin.name == other.name for other in plugins):
                raise PluginError(f"{plugin.name} — two plugins of this name are wanted. Give one another name.")
            plugin.load()
            plugins.append(plugin)
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(HookSpecs)
        calls: dict[str, list[_Call]] = {hook: [] for hook in SPECS}
        for plugin in plugins:
            for hook, function in plugin.implementations.items():
                calls[hook].append(_Call(plugin, hook, function, _argument_names(function)))
            manager.register(plugin.target, name=plugin.name)
        manager.check_pending()
        _check_claims(plugins, calls)
        return cls(tuple(plugins), manager, {hook: tuple(found) for hook, found in calls.items()})

    def close(self) -> None:
        """Unregister every plugin; the set can no longer be called."""
        for plugin in self.plugins:
            self._manager.unregister(name=plugin.name)
        self._calls = {hook: () for hook in SPECS}

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
        return _wrong_answer(self._calls[hook][0].plugin, hook, answer, wanted)

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
                raise _wrong_answer(call.plugin, "encode_features", answer, "a mapping of tensors")
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
                raise _wrong_answer(
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
                raise _wrong_answer(call.plugin, "regularizer", answer, "a hooktuner.Regularizer")
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


def _check_claims(plugins: Sequence[Plugin], calls: Mapping[str, Sequence[_Call]]) -> None:
    families = [plugin for plugin in plugins if plugin.is_family]
    if not families:
        raise PluginError(
            "model_family — no model family is active. Set \"model_family\" in the config or name one with --plugin; "
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
    "HooktunerError",
    "Plugin",
    "PluginSet",
    "catalogue",
    "combines",
    "find_plugin",
    "installed_plugins",
    "normal_name",
    "plugin_from_object",
]
