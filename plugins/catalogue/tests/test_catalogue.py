"""The catalogue is well formed, is found by hooktuner, and agrees with the plugins that are installed."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
from hooktuner.config import RunConfig
from hooktuner.discovery import catalogue, find_plugin, installed_plugins
from hooktuner.errors import PluginError
from hooktuner_catalogue import PLUGINS

FIELDS = {"distribution", "kind", "summary", "keys", "aliases"}


def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_every_name_occurs_once_in_the_file() -> None:
    text = files("hooktuner_catalogue").joinpath("plugins.json").read_text(encoding="utf-8")
    assert json.loads(text, object_pairs_hook=no_twins) == PLUGINS


@pytest.mark.parametrize("name", PLUGINS)
def test_entries_are_complete(name: str) -> None:
    entry = PLUGINS[name]
    assert entry["distribution"] == f"hooktuner-{name}"
    assert entry["kind"] in ("family", "technique")
    assert entry["summary"]
    assert set(entry) <= FIELDS


def test_no_key_has_two_owners() -> None:
    keys = [key for entry in PLUGINS.values() for key in entry.get("keys", ())]
    assert len(keys) == len(set(keys))


def test_no_entry_claims_a_key_of_core() -> None:
    claimed = [(key, known.name) for known in catalogue().values() for key in RunConfig.model_fields if known.owns(key)]
    assert claimed == []


def test_hooktuner_finds_the_catalogue() -> None:
    assert set(PLUGINS) <= set(catalogue())


@pytest.mark.parametrize(
    ("typed", "distribution"),
    [(name, entry["distribution"]) for name, entry in PLUGINS.items()]
    + [(alias, entry["distribution"]) for entry in PLUGINS.values() for alias in entry.get("aliases", ())],
)
def test_a_plugin_that_is_missing_is_answered_with_its_install_line(typed: str, distribution: str) -> None:
    with pytest.raises(PluginError) as refused:
        find_plugin(typed, [])
    assert str(refused.value) == f"{typed} — this plugin is not installed. Install it with: pip install {distribution}"


def test_installed_plugins_agree_with_their_entries() -> None:
    published = catalogue()
    for plugin in installed_plugins():
        if plugin.name not in published:
            continue
        entry = published[plugin.name]
        assert plugin.distribution == entry.distribution
        assert ("family" if plugin.is_family else "technique") == entry.kind
        assert set(plugin.aliases) == set(entry.aliases)
        model = plugin.option_model()
        for pattern in entry.keys:
            if "*" not in pattern:
                assert model is not None
                assert pattern in model.model_fields
