"""Room 2: which plugins a draft wants, and which plugin owns each of its keys.

Wanted are the plugins of `--plugin` (or `plugins=` in Python), the family of `model_family`, those of the key
`plugins`, and installed ones that their own keys switch on. Installed plugins that nobody names are imported (their
light entry modules, one by one) only if the draft has keys that core and the named plugins do not own; a broken one
is then a note.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hooktuner.config import ALIASES, PluginOptions, RunConfig
from hooktuner.discovery import (
    Plugin,
    blamed,
    catalogue,
    claimed_twice,
    find_plugin,
    installed_plugins,
    normal_name,
    plugin_from_object,
)
from hooktuner.draft import Draft
from hooktuner.errors import PluginError, Problem, did_you_mean
from hooktuner.keys import CORE
from hooktuner.values import validated


@dataclass
class Choice:
    """The outcome. `bad` are keys whose value was refused; `failures` are plugins that cannot be used."""

    plugins: list[Plugin] = field(default_factory=list)
    options: dict[str, PluginOptions] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    failures: list[PluginError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def as_problem(error: Exception, where: str | None = None) -> Problem:
    """A `PluginError` (`what — why. fix`) as a problem, at another place if `where` is given."""
    what, dash, rest = str(error).partition(" — ")
    if not dash:
        return Problem(where or "plugins", what)
    why, _, fix = rest.partition(". ")
    return Problem(where or what, why, fix)


def choose(draft: Draft, config: RunConfig) -> Choice:
    """Choose plugins and validate their options. config: core's keys as far as they are right."""
    chooser = _Chooser(draft, config)
    chooser.want_named()
    chooser.check_family()
    for plugin in list(chooser.choice.plugins):
        chooser.take_options(plugin)
    chooser.find_owners()
    return chooser.choice


class _Chooser:
    def __init__(self, draft: Draft, config: RunConfig) -> None:
        self.draft = draft
        self.config = config
        self.choice = Choice()
        self.installed = installed_plugins()
        self.objects: list[Plugin] = []
        self.owners: dict[str, Plugin | None] = dict.fromkeys([*RunConfig.model_fields, *ALIASES])
        """Who owns each known key; None is core."""
        self.family_of_config: Plugin | None = None

    # ------------------------------------------------------------------------------------------------ by name

    def want_named(self) -> None:
        """The plugins that somebody named."""
        given = [wanted if isinstance(wanted, str) else plugin_from_object(wanted) for wanted in self.draft.plugins]
        self.objects = [plugin for plugin in given if isinstance(plugin, Plugin)]
        for wanted in given:
            self._add(self._named(wanted, wanted) if isinstance(wanted, str) else wanted)
        if self.config.model_family is not None:
            where = f"{self.draft.where('model_family')}: {self.config.model_family}"
            self.family_of_config = self._add(self._named(self.config.model_family, where))
        for name in self.config.plugins:
            self._add(self._named(name, f"{self.draft.where('plugins')}: {name}"))

    def _named(self, name: str, where: str) -> Plugin | None:
        for plugin in self.objects:
            if normal_name(name) == plugin.name:
                return plugin
        try:
            return find_plugin(name, self.installed)
        except PluginError as error:
            self.choice.problems.append(as_problem(error, where))
            return None

    def _add(self, plugin: Plugin | None) -> Plugin | None:
        """Import and check a plugin; a broken one is a failure."""
        if plugin is None or any(plugin is other for other in self.choice.plugins):
            return plugin
        try:
            _ = plugin.implementations
        except PluginError as error:
            if all(str(error) != str(other) for other in self.choice.failures):
                self.choice.failures.append(error)
            return None
        self.choice.plugins.append(plugin)
        return plugin

    def check_family(self) -> None:
        """`model_family` names a family, and nobody names another."""
        families = [plugin for plugin in self.choice.plugins if plugin.is_family]
        named = self.family_of_config
        if named is not None and not named.is_family:
            self.choice.problems.append(
                Problem(
                    self.draft.where("model_family"),
                    f"{named.name} ({named.origin}) is not a model family",
                    "`tuner plugins` lists the families that are installed.",
                )
            )
        if len(families) > 1:
            where = self.draft.where("model_family") if named in families else "model_family"
            both = " and ".join(f"{family.name} ({family.origin})" for family in families)
            self.choice.problems.append(
                Problem(
                    where,
                    f"a run has one model family, and two are wanted: {both}",
                    "Let model_family and --plugin name the same one.",
                )
            )
            self.choice.plugins = [
                plugin for plugin in self.choice.plugins if not plugin.is_family or plugin is families[0]
            ]

    # ------------------------------------------------------------------------------------------------ options

    def take_options(self, plugin: Plugin) -> None:
        """Validate the options of an active plugin."""
        model = self._model(plugin)
        if model is None or not self._own(plugin, model.model_fields):
            return
        options = self._validated(plugin, model)
        if options is None:
            return
        written = [key for key in self.draft.values if key in model.model_fields]
        if written and _switch(plugin, options) is False:
            self.choice.problems.append(
                Problem(
                    self.draft.where(*written),
                    f"switches {plugin.name} ({plugin.origin}) off, and the plugin is also asked for by name",
                    "Remove one of the two.",
                )
            )
        self.choice.options[plugin.name] = options

    def _model(self, plugin: Plugin) -> type[PluginOptions] | None:
        try:
            return plugin.option_model()
        except PluginError as error:
            self.choice.failures.append(error)
            return None

    def _own(self, plugin: Plugin, keys: Iterable[str]) -> bool:
        for key in keys:
            owner = self.owners.get(key, plugin)
            if owner is not plugin:
                other = CORE if owner is None else f"{owner.name} ({owner.origin})"
                self.choice.failures.append(
                    PluginError(
                        f"{key} — this config key has two owners: {other} and {plugin.name} ({plugin.origin}). "
                        "Run without one of them."
                    )
                )
                return False
            self.owners[key] = plugin
        return True

    def _validated(self, plugin: Plugin, model: type[PluginOptions]) -> PluginOptions | None:
        options, bad, problems = validated(model, self.draft, f"options of {plugin.name} ({plugin.origin})")
        self.choice.bad |= bad
        self.choice.problems += problems
        return options

    # ------------------------------------------------------------------------------------------- keys of others

    def find_owners(self) -> None:
        """Keys that neither core nor a named plugin owns: switch plugins on, or say who would own the key."""
        unowned = [key for key in self.draft.values if key not in self.owners]
        if not unowned or self.choice.failures:  # a plugin that failed may own them
            return
        models = self._models_of_others()
        for plugin, model in models:
            keys = [key for key in unowned if key in model.model_fields]
            if keys:
                self._switch_on(plugin, model, keys)
        named = set(self.owners) | {key for _, model in models for key in model.model_fields}
        suggestions = self._suggestions(models)
        for key in unowned:
            if key not in named:
                self.choice.problems.append(self._unknown(key, suggestions))

    def _models_of_others(self) -> list[tuple[Plugin, type[PluginOptions]]]:
        models = []
        active = {plugin.name for plugin in self.choice.plugins}
        for plugin in self.installed:
            if plugin.name in active:
                continue
            try:
                model = plugin.option_model()
            except Exception as failure:  # a plugin that nobody wants harms nothing
                self.choice.notes.append(f"An installed plugin was not asked about its options: {failure}")
                continue
            if model is not None:
                models.append((plugin, model))
        return models

    def _switch_on(self, plugin: Plugin, model: type[PluginOptions], keys: list[str]) -> None:
        options = self._validated(plugin, model)
        switch = None if options is None else _switch(plugin, options)
        unclear = claimed_twice(plugin, self.installed)
        if switch is None and self.choice.bad & set(keys):
            return  # what was refused may be the value that switches the plugin on
        if switch is None and options is not None:
            one = "the option" if len(keys) == 1 else "these options"
            kind, fix = "plugin", f"Activate it with --plugin {plugin.name}, or remove {one}."
            if plugin.is_family:
                kind, fix = "model family", f"Choose that family, or remove {one}."
            why = f"belongs to the {kind} {plugin.name} ({plugin.origin}), which is not active"
            self.choice.problems += [Problem(self.draft.where(key), why, fix) for key in keys]
        elif switch and unclear:
            self.choice.problems.append(as_problem(PluginError(f"{self.draft.where(keys[0])} — {unclear}")))
        elif switch and options is not None and self._own(plugin, model.model_fields) and self._add(plugin):
            self.choice.options[plugin.name] = options

    def _suggestions(self, models: list[tuple[Plugin, type[PluginOptions]]]) -> dict[str, str]:
        """Every known key and, for those of plugins, whose it is."""
        known = {key: f" ({owner.origin})" if owner else "" for key, owner in self.owners.items()}
        for plugin, model in models:
            known |= {key: f" ({plugin.origin})" for key in model.model_fields if key not in known}
        for published in catalogue(self.choice.notes).values():
            exact = [key for key in published.keys if "*" not in key]
            known |= {key: f" ({published.distribution}, not installed)" for key in exact if key not in known}
        return known

    def _unknown(self, key: str, suggestions: dict[str, str]) -> Problem:
        where = self.draft.where(key)
        installed = {plugin.name for plugin in self.installed}
        for published in catalogue().values():
            if published.owns(key) and published.name not in installed:
                return Problem(
                    where,
                    f"this option belongs to the plugin {published.name}, which is not installed",
                    f"Install it with: {published.install}",
                )
        guess = did_you_mean(key, suggestions)
        if guess:
            guess += suggestions[guess.split('"')[1]]
        return Problem(where, "unknown option", guess or "`tuner config schema` lists every option.")


def _switch(plugin: Plugin, options: Any) -> bool | None:
    with blamed(plugin, "the active() of its options"):
        return options.active()
