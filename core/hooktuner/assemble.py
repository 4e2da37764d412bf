"""Room 3: a draft and the plugins it wants become one frozen configuration, or one report of everything wrong.

`assemble` needs no weights and no torch: it is what `tuner config check` does, and the first thing that a run does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hooktuner.checks import Findings, card_findings, config_findings, notes, rounded_resolution
from hooktuner.choose import Choice, as_problem, choose
from hooktuner.config import FAMILY_DEFAULTS, RunConfig
from hooktuner.context import Run
from hooktuner.discovery import blamed
from hooktuner.draft import Draft
from hooktuner.errors import ConfigError, HooktunerError, PluginError, Problem, did_you_mean
from hooktuner.family import Flavour, ModelCard
from hooktuner.keys import problems_of
from hooktuner.plugins import PluginSet
from hooktuner.sources import build_model_source
from hooktuner.values import plain_dict, validated

PATHS = ("output_dir", "cache_dir", "data_backend_config", "user_prompt_library", "pretrained_model_name_or_path")
"""Keys that are paths of the user's: a leading ~ is expanded."""


@dataclass
class Assembled:
    """A complete, checked run before anything is loaded. `origins` says of each key where its value comes from."""

    run: Run
    plugins: PluginSet
    draft: Draft
    origins: Mapping[str, str]

    def close(self) -> None:
        """Undo everything, for those who only looked."""
        try:
            self.run.close()
        finally:
            self.plugins.close()


def assemble(draft: Draft, *, with_datasets: bool = True) -> Assembled:
    """Choose plugins, complete the config, and check everything that can be checked before anything is loaded.

    with_datasets: read and check `data_backend_config` too. The caller closes what it is given.

    Errors: `ConfigError` with all problems at once; `PluginError` where only plugins are to blame.
    """
    if draft.unreadable:
        raise ConfigError(draft.problems)
    partial, bad, problems = validated(RunConfig, draft, "config")
    assert partial is not None, "RunConfig has no rules over several keys"
    choice = choose(draft, partial)
    bad |= choice.bad
    problems = [*draft.problems, *problems, *choice.problems]
    failures: list[HooktunerError] = list(choice.failures)
    assembly = _Assembly(draft, choice, bad, problems, failures)
    plugins = assembly.plugin_set()
    if plugins is None:
        assembly.check(partial)
        raise assembly.error()
    try:
        run, origins = assembly.complete(partial, plugins, with_datasets=with_datasets)
        if assembly.problems or assembly.failures:
            raise assembly.error()
    except BaseException:
        plugins.close()
        raise
    return Assembled(run, plugins, draft, origins)


@dataclass
class _Assembly:
    draft: Draft
    choice: Choice
    bad: set[str]
    problems: list[Problem]
    failures: list[HooktunerError]

    def plugin_set(self) -> PluginSet | None:
        """The active plugins, or None where they do not go together."""
        if not any(plugin.is_family for plugin in self.choice.plugins) and (self.problems or self.failures):
            named = "model_family" in self.draft.values or self.draft.plugins or self.failures
            if not named:
                self.problems.append(as_problem(_refusal(self.choice), self.draft.where("model_family")))
            return None
        try:
            return PluginSet.assemble(self.choice.plugins)
        except PluginError as error:
            self.failures.append(error)
            return None

    def check(self, config: RunConfig) -> None:
        """The checks that need no model."""
        findings = Findings(self.draft, self.bad)
        findings.add(*config_findings(config))
        self.problems += findings.problems

    def complete(self, partial: RunConfig, plugins: PluginSet, *, with_datasets: bool) -> tuple[Run, Mapping[str, str]]:
        """The run with its complete config; what is wrong is added to `problems` and `failures`."""
        draft = self.draft
        try:
            card = plugins.describe_model(Run(config=partial, options=self.choice.options))
        except HooktunerError as error:
            self.failures.append(error)
            self.check(partial)
            raise self.error() from error
        flavour, chosen = self._flavour(partial, card)
        config, origins = self._filled(partial, plugins, card, flavour)
        self.check(config)
        run = Run(config=config, options=self.choice.options, card=card)
        run.notes.extend(self.choice.notes)
        latents = card.latents_of(flavour.name)
        if chosen:
            findings = Findings(draft, self.bad)
            findings.add(*card_findings(config, card, flavour))
            self.problems += findings.problems
            run.config = config = self._rounded(run, latents.size_multiple)
        for sentence in notes(config, card, flavour):
            run.note(sentence)
        if with_datasets and config.data_backend_config is not None and "data_backend_config" not in self.bad:
            self._datasets(run, flavour if chosen else None)
        run.model_path = config.pretrained_model_name_or_path or flavour.repository
        try:
            plugins.check_needs(card)
        except PluginError as error:
            self.failures.append(error)
        if chosen and not self.bad:
            self._ask_plugins(run, plugins)
        for options in self.choice.options.values():
            for key in _keys(options):
                origins[key] = draft.values[key].origin if key in draft.values else "default"
        return run, origins

    # ---------------------------------------------------------------------------------------------- the family

    def _flavour(self, config: RunConfig, card: ModelCard) -> tuple[Flavour, bool]:
        """The flavour to check with, and whether it is the one that the user means."""
        wanted = config.model_flavour or card.default_flavour
        if wanted in card.flavours:
            return card.flavours[wanted], "model_flavour" not in self.bad
        self.problems.append(
            Problem(
                self.draft.where("model_flavour"),
                f'{card.name} has no flavour "{wanted}"',
                f"{did_you_mean(wanted, card.flavours)} It has: {', '.join(card.flavours)}.".strip(),
            )
        )
        return card.flavours[card.default_flavour], False

    def _filled(
        self, partial: RunConfig, plugins: PluginSet, card: ModelCard, flavour: Flavour
    ) -> tuple[RunConfig, dict[str, str]]:
        """The config with the family's defaults, and where each of its values comes from."""
        family = plugins.family
        written = partial.model_fields_set
        values: dict[str, Any] = {name: getattr(partial, name) for name in written}
        for name in PATHS:
            if isinstance(values.get(name), str):
                values[name] = os.path.expanduser(values[name])
        techniques = tuple(
            plugin.name for plugin in plugins.plugins if plugin is not family and plugin.entry_point is not None
        )
        defaults = dict(card.defaults_of(flavour.name))
        if card.media == "image":
            defaults.setdefault("validation_num_video_frames", 1)
        defaults.setdefault("validation_negative_prompt", "")
        unknown = [key for key in defaults if key not in RunConfig.model_fields]
        missing = [key for key in _needed(card) if defaults.get(key) is None and key not in values]
        if unknown or missing:
            why = f"no such config key: {', '.join(unknown)}" if unknown else f"nothing for {', '.join(missing)}"
            raise PluginError(
                f"{family.name} ({family.origin}) — the defaults of its model card have {why}. "
                "This is a mistake in the plugin: report it to its author."
            )
        filled = {key: value for key, value in defaults.items() if key not in values and value is not None}
        identity = {"model_family": family.name, "model_flavour": flavour.name, "plugins": techniques}
        try:
            config = RunConfig.model_validate({**values, **filled, **identity})
        except ValidationError as error:
            wrong = problems_of(error, filled, lambda key: key, RunConfig)
            raise PluginError(
                f"{family.name} ({family.origin}) — the defaults of its model card are not possible: "
                f"{'; '.join(f'{problem.where} {problem.why}' for problem in wrong)}. "
                "This is a mistake in the plugin: report it to its author."
            ) from error
        origins = {
            name: self.draft.values[name].origin
            if name in written
            else f"default of {family.name}"
            if name in filled or name in ("model_family", "model_flavour")
            else "default"
            for name in RunConfig.model_fields
        }
        if techniques != partial.plugins:
            origins["plugins"] = "the active plugins"
        return config, origins

    def _rounded(self, run: Run, multiple: int) -> RunConfig:
        """The config with validation sizes that the model can make, and a note where that changed them."""
        asked, rounded = run.config.validation_resolution, rounded_resolution(run.config, multiple)
        if rounded == asked:
            return run.config
        exact = rounded_resolution(run.config, 1)
        if rounded != exact:
            run.note(f"validation_resolution {asked} becomes {rounded}: sizes must be multiples of {multiple} pixels.")
        return run.config.model_copy(update={"validation_resolution": rounded})

    # ---------------------------------------------------------------------------------------- data and plugins

    def _datasets(self, run: Run, flavour: Flavour | None) -> None:
        from hooktuner.data import datasets

        assert run.card is not None
        assert run.config.data_backend_config is not None
        found, problems = datasets.read_datasets(Path(run.config.data_backend_config), run.config)
        run.datasets = found
        if flavour is not None:
            problems += datasets.frame_problems(found, run.card.latents_of(flavour.name), run.config)
            problems += datasets.conditioning_problems(found, flavour)
        self.problems += self._placed(problems)

    def _ask_plugins(self, run: Run, plugins: PluginSet) -> None:
        """`ModelCard.check` and `PluginOptions.problems`, with blame for exceptions."""
        assert run.card is not None
        if run.card.check is not None:
            with blamed(plugins.family, "the check of its model card"):
                self.problems += self._placed(list(run.card.check(run)))
        for plugin in plugins.plugins:
            if plugin.name in run.options:
                with blamed(plugin, "the problems() of its options"):
                    self.problems += self._placed(list(run.options[plugin.name].problems(run)))

    def _placed(self, problems: Sequence[Problem]) -> list[Problem]:
        """Problems whose place is a config key name, with the file or flag where it was written."""
        known = set(RunConfig.model_fields) | {key for model in self.choice.options.values() for key in _keys(model)}
        return [
            Problem(self.draft.where(problem.where), problem.why, problem.fix)
            if problem.where.partition(".")[0] in known
            else problem
            for problem in problems
        ]

    def error(self) -> HooktunerError:
        """Everything that is wrong as one exception."""
        if not self.problems:
            if len(self.failures) == 1:
                return self.failures[0]
            return PluginError("\n".join(str(failure) for failure in self.failures))
        places = [as_problem(failure) for failure in self.failures]
        error = ConfigError(list(dict.fromkeys([*self.problems, *places])))
        error.__cause__ = self.failures[0] if self.failures else None
        return error


def _refusal(choice: Choice) -> PluginError:
    try:
        PluginSet.assemble(choice.plugins)
    except PluginError as error:
        return error
    raise AssertionError("a set without a family is refused")


def _keys(options: Any) -> Sequence[str]:
    return list(type(options).model_fields)


def _needed(card: ModelCard) -> Sequence[str]:
    """The keys that only the family can fill in."""
    video = ("frame_rate", "validation_num_video_frames") if card.media == "video" else ()
    return tuple(key for key in FAMILY_DEFAULTS if key in (*_ALWAYS, *video))


_ALWAYS = ("flow_schedule_shift", "validation_resolution", "validation_guidance")


def resolved(run: Run) -> dict[str, Any]:
    """The complete configuration as one flat JSON object; a config that is read from it is equal.

    Content of `config.resolved.json`. Keys without a value are left out of plugins' options (they mean "not said").
    """
    flat = dict(plain_dict(run.config))
    for options in run.options.values():
        flat |= {key: value for key, value in plain_dict(options).items() if value is not None}
    return flat


__all__ = ["Assembled", "assemble", "build_model_source", "resolved"]
