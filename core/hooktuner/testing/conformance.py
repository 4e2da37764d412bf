"""`PluginConformance`: the rules that every plugin keeps, as a test class to inherit from (needs pytest).

    from hooktuner.testing import PluginConformance

    class TestConformance(PluginConformance):
        plugin = "my-plugin"

Checks that do not apply are skipped with the reason: the packaging checks for a plugin object that is not installed,
the family checks for a technique. The family checks are in `conformance_family`, those that train whole runs in
`conformance_runs`. A failing check says what is wrong with the plugin, not only what differs.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hooktuner.assemble import assemble
from hooktuner.config import ALIASES, PluginOptions, RunConfig
from hooktuner.discovery import SPECS, Plugin, installed_plugins, normal_name
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError
from hooktuner.hookspecs import GROUP
from hooktuner.plugins import PluginSet
from hooktuner.testing.conformance_family import FamilyChecks
from hooktuner.testing.conformance_runs import RunChecks
from hooktuner.testing.runs import as_plugin

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")
"""What an entry module must not import."""

_LIGHT = """
import importlib, json, sys
from hooktuner.config import RunConfig
from hooktuner.context import Run
from hooktuner.plugins import PluginSet, plugin_from_object
target = importlib.import_module(sys.argv[1])
for name in filter(None, sys.argv[2].split(".")):
    target = getattr(target, name)
plugin = plugin_from_object(target)
model = plugin.option_model()
if plugin.is_family:
    PluginSet.assemble([plugin]).describe_model(Run(RunConfig(), {plugin.name: model()} if model else {}))
print(json.dumps(sorted(set(sys.argv[3:]) & set(sys.modules))))
"""
"""Run in a fresh interpreter: prints which of the heavy modules a plugin has imported."""


class PluginConformance(FamilyChecks, RunChecks):
    """Inherit, name the plugin, and pytest runs every check."""

    plugin: ClassVar[Any]
    """The name of an installed plugin, or a plugin object or class."""
    family: ClassVar[Any] = None
    """For techniques: the family to test with, by name or as an object; None: the toy family."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Config keys with which the plugin does something (for techniques: that switch it on)."""
    readme: ClassVar[Path | str | None] = None
    """The README; None: beside the plugin's pyproject.toml, else the distribution's description."""

    # ------------------------------------------------------------------------------------------------- packaging

    def test_identity(self) -> None:
        """Entry point, distribution, import package and folder carry the plugin's one name."""
        plugin = self._installed()
        name = plugin.name
        assert plugin.entry_point is not None
        assert plugin.entry_point.name == name, (
            f"the entry point in {GROUP!r} is called {plugin.entry_point.name!r}; write it as users type it: {name!r}"
        )
        distribution = re.sub(r"[-_.]+", "-", plugin.distribution).lower()
        assert distribution == f"hooktuner-{name}", (
            f"the distribution is called {plugin.distribution!r}; call it 'hooktuner-{name}'"
        )
        package = plugin.entry_point.module.partition(".")[0]
        wanted = "hooktuner_" + name.replace("-", "_")
        assert package == wanted, f"the entry point is in the package {package!r}; call it {wanted!r}"
        root = self._project_folder(plugin)
        assert root is None or normal_name(root.name) == name, (
            f"the project's folder is called {root.name!r}; call it {name.replace('-', '_')!r}"
        )

    def test_dependency_on_core_is_bounded(self) -> None:
        """The distribution requires hooktuner, with an upper bound, because the hook API may change."""
        from packaging.requirements import Requirement

        plugin = self._installed()
        requirements = [Requirement(text) for text in metadata.requires(plugin.distribution) or ()]
        core = [requirement for requirement in requirements if normal_name(requirement.name) == "hooktuner"]
        assert core, f"{plugin.distribution} does not require hooktuner: add it to the project's dependencies"
        bounded = any(part.operator in ("<", "<=", "~=", "==") for one in core for part in one.specifier)
        assert bounded, f'{plugin.distribution} requires "{core[0]}" without an upper bound: add one, e.g. "<0.2"'

    def test_readme_lists_every_option(self) -> None:
        """The README names every config key that the plugin owns, as `key`."""
        plugin = self._plugin()
        model = plugin.option_model()
        if model is None:
            pytest.skip("the plugin owns no config keys")
        text = self._readme_text(plugin)
        missing = [key for key in model.model_fields if not re.search(rf"`[^`\n]*\b{re.escape(key)}\b[^`\n]*`", text)]
        assert not missing, f"the README does not name {', '.join(f'`{key}`' for key in missing)}"

    def test_entry_module_is_light(self) -> None:
        """Importing the entry module and asking for options and card imports no torch, diffusers, transformers, …"""
        plugin = self._installed()
        assert plugin.entry_point is not None
        module = plugin.entry_point.module
        command = [sys.executable, "-c", _LIGHT, module, plugin.entry_point.attr, *HEAVY]
        paths = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        assert done.returncode == 0, f"importing {module} in a fresh interpreter failed:\n{done.stderr}"
        heavy = json.loads(done.stdout.splitlines()[-1])
        assert not heavy, f"{module} imports {', '.join(heavy)}: import them inside the hooks that need them"

    # ----------------------------------------------------------------------------------------------------- hooks

    def test_hooks_match_the_specs(self) -> None:
        """Every hook exists in this API and takes arguments of its spec, by name, without defaults."""
        assert self._plugin().implementations, "the plugin answers no hook: mark methods with @hooktuner.hookimpl"

    def test_errors_are_blamed_on_the_plugin(self) -> None:
        """An exception in any hook reaches the caller with a note that names plugin, version and hook."""
        plugin = self._plugin()
        for hook, function in plugin.implementations.items():
            broken = _with_failing_hook(plugin, hook, function)
            plugins = PluginSet.assemble([broken] if broken.is_family else [as_plugin(self._family()), broken])
            arguments = [None] * (len(inspect.signature(SPECS[hook]).parameters) - 1)
            with pytest.raises(_Injected) as caught:
                getattr(plugins, hook)(*arguments)
            plugins.close()
            notes = " ".join(getattr(caught.value, "__notes__", ()))
            for part in (plugin.name, plugin.version, hook):
                assert part in notes, f"the note of an exception in hook {hook} is {notes!r}; it lacks {part!r}"

    # --------------------------------------------------------------------------------------------------- options

    def test_options_have_valid_defaults(self) -> None:
        """Without any key in the config the options are valid, and they survive a round trip through JSON."""
        model = self._option_model()
        for values in ({}, {key: value for key, value in self.options.items() if key in model.model_fields}):
            options = model(**values)
            again = model.model_validate_json(options.model_dump_json())
            assert again == options, f"{options!r} comes back from JSON as {again!r}"

    def test_options_are_described(self) -> None:
        """Every config key has a description, and none is a key of core."""
        model = self._option_model()
        bare = [key for key, field in model.model_fields.items() if not (field.description or "").strip()]
        assert not bare, f"{', '.join(bare)}: without description. `tuner config explain` and the docs show it"
        taken = sorted(set(model.model_fields) & {*RunConfig.model_fields, *ALIASES})
        assert not taken, f"{', '.join(taken)}: core owns this config key; choose another name"
        unknown = sorted({key for keys in model.cache_fields.values() for key in keys} - set(model.model_fields))
        assert not unknown, f"cache_fields names {', '.join(unknown)}, which the options do not have"

    def test_unknown_options_are_refused(self) -> None:
        """A misspelt key is an error that suggests the right one, and options cannot be changed once they are made."""
        model = self._option_model()
        assert model.model_config.get("extra") == "forbid", 'do not override extra="forbid": misspelt keys would pass'
        assert model.model_config.get("frozen") is True, "do not override frozen=True: options are facts of the run"
        wanted = [self._family()] if self._plugin().is_family else [self._family(), self.plugin]
        for key in model.model_fields:
            misspelt = key[:-1] + key[-1] * 2
            with pytest.raises(ConfigError) as caught:
                assemble(read_draft({misspelt: 1}, plugins=wanted), with_datasets=False)
            why = [problem for problem in caught.value.problems if misspelt in problem.where]
            assert why, f"{misspelt} is accepted, and {key} is what was meant"
            assert f'"{key}"' in str(why[0]), f"{misspelt} is refused without a word about {key}: {why[0]}"

    # --------------------------------------------------------------------------------------------------- helpers

    def _plugin(self) -> Plugin:
        return as_plugin(self.plugin)

    def _family(self) -> Any:
        if self._plugin().is_family:
            return self.plugin
        if self.family is not None:
            return self.family
        from hooktuner.testing.toy import ToyFamily

        return ToyFamily

    def _family_flavour(self) -> str | None:
        """The offline flavour of the family to run with; None is its default."""
        return self.tiny_flavour if self._plugin().is_family or self.family is not None else None

    def _installed(self) -> Plugin:
        if not isinstance(self.plugin, str):
            pytest.skip("the plugin is an object that is not installed")
        name = normal_name(self.plugin)
        found = [plugin for plugin in installed_plugins() if plugin.name == name]
        assert found, f"no installed distribution has an entry point {name!r} in the group {GROUP!r}"
        assert len(found) == 1, f"{len(found)} distributions have the entry point {name!r}"
        return found[0]

    def _option_model(self) -> type[PluginOptions]:
        model = self._plugin().option_model()
        if model is None:
            pytest.skip("the plugin owns no config keys")
        return model

    def _project_folder(self, plugin: Plugin) -> Path | None:
        """The folder that holds pyproject.toml and the import package; None for a plugin installed from a wheel."""
        assert plugin.entry_point is not None
        spec = importlib.util.find_spec(plugin.entry_point.module.partition(".")[0])
        if spec is None or spec.origin is None:
            return None
        root = Path(spec.origin).parent.parent
        return root if (root / "pyproject.toml").is_file() else None

    def _readme_text(self, plugin: Plugin) -> str:
        if self.readme is not None:
            return Path(self.readme).read_text(encoding="utf-8")
        if plugin.entry_point is None:
            pytest.skip("the plugin is an object that is not installed; name its `readme`")
        root = self._project_folder(plugin)
        if root is not None:
            assert (root / "README.md").is_file(), f"{root.name} has no README.md"
            return (root / "README.md").read_text(encoding="utf-8")
        fields = metadata.metadata(plugin.distribution).json
        return str(fields.get("description", ""))


class _Injected(Exception):
    """What the check of blame raises inside a hook."""


def _with_failing_hook(plugin: Plugin, hook: str, function: Callable[..., Any]) -> Plugin:
    """The plugin with one hook replaced by one of the same arguments that raises."""

    def fail(*arguments: Any) -> Any:
        raise _Injected(hook)

    fail.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    broken = copy.copy(plugin)
    broken.__dict__["implementations"] = {**plugin.implementations, hook: fail}
    return broken
