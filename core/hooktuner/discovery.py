"""What plugins there are: installed ones by entry point, published ones by catalogue, objects of the user's own.

Nothing is imported to list them. A plugin is imported by `Plugin.load`, and its hooks are checked against the specs
by `Plugin.implementations`; every message names plugin, distribution and version.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from hooktuner.errors import PluginError, did_you_mean
from hooktuner.hookspecs import API, GROUP, PROJECT, Combine, HookSpecs

if TYPE_CHECKING:
    from hooktuner.config import PluginOptions

CATALOGUE_GROUP = "hooktuner.catalogue.v1"

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
            except (Exception, SystemExit) as failure:
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
        return frozenset(self._names("needs"))

    @property
    def aliases(self) -> frozenset[str]:
        """Further names that users may type (`aliases` of the plugin's class)."""
        return frozenset(normal_name(alias) for alias in self._names("aliases"))

    def _names(self, attribute: str) -> Sequence[str]:
        names = getattr(self.load(), attribute, ())
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise PluginError(
                f"{self.name} ({self.origin}) — `{attribute}` must be a tuple of names, not {names!r}. "
                "This is a mistake in the plugin: report it to its author."
            )
        return tuple(names)

    @property
    def summary(self) -> str:
        """The first line of the docstring of the loaded plugin."""
        return (inspect.getdoc(self.load()) or "").partition("\n")[0]

    def option_model(self) -> type[PluginOptions] | None:
        """The plugin's option model, or None where it owns no keys."""
        from hooktuner.config import PluginOptions

        if "options" not in self.implementations:
            return None
        model = HookCall(self, "options", self.implementations["options"])({})
        if not (inspect.isclass(model) and issubclass(model, PluginOptions)):
            raise wrong_answer(self, "options", model, "a subclass of hooktuner.PluginOptions")
        return model


def installed_plugins() -> list[Plugin]:
    """Every plugin that is installed, sorted by name, not imported.

    A name can occur twice; `find_plugin` refuses it.
    """
    found: dict[tuple[str, str], Plugin] = {}
    for entry_point in entry_points(group=GROUP):
        distribution = entry_point.dist
        plugin = Plugin(
            name=normal_name(entry_point.name),
            distribution=distribution.name if distribution else "unknown",
            version=distribution.version if distribution else "unknown",
            entry_point=entry_point,
        )
        found.setdefault((plugin.name, plugin.distribution), plugin)
    return [found[key] for key in sorted(found)]


def claimed_twice(plugin: Plugin, installed: Sequence[Plugin]) -> str | None:
    """Why the name of `plugin` is not clear, where another installed distribution provides it too."""
    same = [other.origin for other in installed if other.name == plugin.name]
    if len(same) < 2:
        return None
    return f"two installed distributions provide a plugin of this name: {' and '.join(same)}. Uninstall all but one."


@dataclass(frozen=True)
class Published:
    """A plugin that a catalogue knows: it can be installed, whether it is or not.

    `keys` are the config keys that it owns, as names or patterns (`name_*`).
    """

    name: str
    distribution: str
    kind: str
    summary: str
    keys: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def owns(self, key: str) -> bool:
        """Whether the plugin owns a config key."""
        return any(fnmatchcase(key, pattern) for pattern in self.keys)

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install {self.distribution}"


def catalogue(notes: list[str] | None = None) -> dict[str, Published]:
    """Published plugins by name, from installed catalogues.

    Core knows no plugin by name; what could be installed is data that catalogue packages bring (entry-point group
    `hooktuner.catalogue.v1`: a mapping of plugin name to an object with `distribution`, `kind`, `summary`, and
    optionally `keys` and `aliases`). A broken catalogue costs only its suggestions; why is added to `notes`.
    """
    merged: dict[str, Published] = {}
    for entry_point in entry_points(group=CATALOGUE_GROUP):
        try:
            for name, entry in entry_point.load().items():
                merged[normal_name(name)] = Published(
                    name=normal_name(name),
                    distribution=str(entry["distribution"]),
                    kind=str(entry["kind"]),
                    summary=str(entry["summary"]),
                    keys=tuple(entry.get("keys", ())),
                    aliases=tuple(entry.get("aliases", ())),
                )
        except (Exception, SystemExit) as failure:
            if notes is not None:
                notes.append(f"The catalogue {entry_point.value} cannot be read: {type(failure).__name__}: {failure}.")
    return merged


def find_plugin(name: str, installed: Sequence[Plugin]) -> Plugin:
    """The installed plugin of this name or alias.

    Errors: `PluginError` with the nearest name, or with the `pip install` line where a catalogue knows it, or where
    two distributions provide it.
    """
    wanted = normal_name(name)
    found = next((plugin for plugin in installed if plugin.name == wanted), None) or _by_alias(wanted, installed)
    if found is not None:
        unclear = claimed_twice(found, installed)
        if unclear:
            raise PluginError(f"{name} — {unclear}")
        return found
    published = catalogue()
    for known in published.values():
        if wanted == known.name or wanted in map(normal_name, known.aliases):
            raise PluginError(f"{name} — this plugin is not installed. Install it with: {known.install}")
    names = [plugin.name for plugin in installed]
    have = f"Installed: {', '.join(dict.fromkeys(names))}." if names else "No plugin is installed."
    guess = did_you_mean(wanted, [*names, *published])
    raise PluginError(" ".join(f"{name} — no plugin of this name is installed. {guess} {have}".split()))


def _by_alias(wanted: str, installed: Sequence[Plugin]) -> Plugin | None:
    """Aliases live in the light entry modules; one that cannot be imported has none."""
    for plugin in installed:
        try:
            if wanted in plugin.aliases:
                return plugin
        except PluginError:
            continue
    return None


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


# ---------------------------------------------------------------------------------------------------- validation


def _implementations(plugin: Plugin) -> Iterator[tuple[str, Callable[..., Any]]]:
    target = plugin.load()
    for name in dir(target):
        if name.startswith("__"):
            continue
        function = inspect.getattr_static(target, name)
        function = getattr(function, "__func__", function)  # static and class methods
        marked = getattr(function, f"{PROJECT}_impl", None)
        if marked is None:
            if name in SPECS and inspect.isroutine(function):
                raise PluginError(
                    f"{plugin.name} ({plugin.origin}) — its {name}() is named like the hook {name} but would never be "
                    "called. Put @hooktuner.hookimpl above it, or give it another name."
                )
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


def wrong_answer(plugin: Plugin, hook: str, answer: object, wanted: str) -> PluginError:
    """The error for an answer that breaks a hook's contract."""
    return PluginError(
        f"{plugin.name} ({plugin.origin}) — hook {hook} answered {_describe(answer)}; it must return {wanted}. "
        "This is a mistake in the plugin: report it to its author."
    )


def _describe(answer: object) -> str:
    shape = getattr(answer, "shape", None)
    return f"{type(answer).__name__} of shape {tuple(shape)}" if shape is not None else f"{type(answer).__name__}"


class HookCall:
    """One hook implementation, ready to be called with the hook's arguments by name.

    Argument names are looked up once, not per step. An exception keeps its traceback and gains a note that names
    plugin, version and hook.
    """

    def __init__(self, plugin: Plugin, hook: str, function: Callable[..., Any]) -> None:
        self.plugin = plugin
        self.hook = hook
        self._function = function
        self._names = tuple(inspect.signature(function).parameters)

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """Call it with those of `arguments` that it wants."""
        with blamed(self.plugin, f"hook {self.hook}"):
            return self._function(*[arguments[name] for name in self._names])


@contextmanager
def blamed(plugin: Plugin, place: str) -> Iterator[None]:
    """Note on every exception of the body which plugin raised it, and where (`hook predict`, `card.check` …)."""
    try:
        yield
    except (Exception, SystemExit) as failure:
        failure.add_note(f"raised by plugin {plugin.name} ({plugin.origin}) in {place}")
        raise
