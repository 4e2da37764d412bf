"""What `tuner plugins` and `tuner config explain` tell about installed and published plugins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from hooktuner.config import PluginOptions, RunConfig
from hooktuner.context import Run
from hooktuner.discovery import (
    HookCall,
    Plugin,
    Published,
    catalogue,
    claimed_twice,
    find_plugin,
    installed_plugins,
)
from hooktuner.errors import PluginError
from hooktuner.keys import CORE, Key, keys_of
from hooktuner.report import Reporter

USABLE = "ok"


def describe(plugin: Plugin, installed: Sequence[Plugin]) -> dict[str, Any]:
    """One installed plugin for the list; `status` is `ok` or why it cannot be used."""
    entry = {"name": plugin.name, "version": plugin.version, "distribution": plugin.distribution, "installed": True}
    unclear = claimed_twice(plugin, installed)
    try:
        hooks = [*plugin.implementations]
        plugin.option_model()
    except (Exception, SystemExit) as failure:  # whatever a plugin does, the list is complete
        why = str(failure).partition(" — ")[2] or str(failure)
        return {**entry, "kind": "unknown", "summary": "", "hooks": [], "status": f"cannot be used: {why}"}
    return {
        **entry,
        "kind": "family" if plugin.is_family else "technique",
        "summary": plugin.summary,
        "hooks": hooks,
        "status": f"cannot be used: {unclear}" if unclear else USABLE,
    }


def _published(known: Published) -> dict[str, Any]:
    return {
        "name": known.name,
        "version": "",
        "distribution": known.distribution,
        "installed": False,
        "kind": known.kind,
        "summary": known.summary,
        "hooks": [],
        "status": f"not installed: {known.install}",
    }


def list_plugins(*, as_json: bool) -> None:
    """Print every installed plugin, and those of catalogues that are not installed."""
    installed = installed_plugins()
    notes: list[str] = []
    rows = [describe(plugin, installed) for plugin in installed]
    names = {plugin.name for plugin in installed}
    rows += [_published(known) for known in catalogue(notes).values() if known.name not in names]
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    reporter = Reporter()
    if not rows:
        reporter.line("No plugin is installed. A run needs a model family: pip install hooktuner-NAME.")
    else:
        columns = ("name", "kind", "version", "distribution", "status", "hooks")
        reporter.table(columns, [[*(row[name] for name in columns[:-1]), ", ".join(row["hooks"])] for row in rows])
    for note in notes:
        reporter.note(note)


def show_plugin(name: str, *, as_json: bool) -> None:
    """Print all about one plugin.

    Errors: `PluginError` for a plugin that is not installed or cannot be used.
    """
    plugin = find_plugin(name, installed_plugins())
    about = describe(plugin, [plugin])
    if about["status"] != USABLE:
        plugin.load()
        raise PluginError(f"{plugin.name} ({plugin.origin}) — {about['status']}")
    model = plugin.option_model()
    keys = keys_of(model, plugin.origin) if model else []
    about |= {"aliases": sorted(plugin.aliases), "needs": sorted(plugin.needs)}
    about["keys"] = [asdict(key) for key in keys]
    if plugin.is_family:
        card = HookCall(plugin, "describe_model", plugin.implementations["describe_model"])(
            {"run": Run(config=RunConfig(model_family=plugin.name))}
        )
        about |= {
            "offers": sorted(card.offers),
            "default_flavour": card.default_flavour,
            "flavours": {flavour.name: flavour.summary for flavour in card.flavours.values()},
        }
    if as_json:
        click.echo(json.dumps(about, indent=2, ensure_ascii=False))
        return
    reporter = Reporter()
    reporter.section(f"{plugin.name} ({plugin.origin})")
    reporter.line(about["summary"])
    lists = ("kind", "aliases", "needs", "offers", "hooks", "default_flavour")
    reporter.table(("", ""), [(name, _joined(about[name])) for name in lists if about.get(name)])
    if about.get("flavours"):
        reporter.section("flavours")
        reporter.table(("", ""), list(about["flavours"].items()))
    if keys:
        reporter.section("config keys")
        reporter.table(
            ("", "type", "default", ""), [(key.name, key.type, key.default, key.description) for key in keys]
        )


def _joined(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def option_models(names: Sequence[str] = ()) -> list[tuple[Plugin, type[PluginOptions]]]:
    """The option models of the named plugins, or of every installed plugin that can be used.

    Errors: `PluginError` for a named plugin that is not installed or cannot be used.
    """
    installed = installed_plugins()
    models = []
    for plugin in [find_plugin(name, installed) for name in names] or installed:
        try:
            model = plugin.option_model()
        except (Exception, SystemExit):
            if names:
                raise
            continue
        if model is not None:
            models.append((plugin, model))
    return models


def all_keys() -> list[Key]:
    """Core's keys, then those of installed plugins."""
    keys = keys_of(RunConfig, CORE)
    for plugin, model in option_models():
        keys += keys_of(model, plugin.origin)
    return keys
