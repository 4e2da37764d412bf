"""Every hook spec says who answers, how answers combine, and what its contract is."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
from hooktuner.discovery import SPECS
from hooktuner.hookspecs import API, GROUP, Combine
from hooktuner.plugins import PluginSet


def test_the_hooks_of_this_api() -> None:
    assert (API, GROUP) == (1, "hooktuner.plugins.v1")
    assert {name: spec.combines for name, spec in SPECS.items()} == {  # type: ignore[attr-defined]
        "options": "union",
        "describe_model": "slot",
        "commands": "union",
        "load_model": "slot",
        "encode_text": "slot",
        "encode_latents": "slot",
        "encode_features": "union",
        "offload_strategy": "at_most_one",
        "intercept_blocks": "nested",
        "regularizer": "union",
        "condition": "slot",
        "prepare_input": "at_most_one",
        "predict": "slot",
        "compute_loss": "at_most_one",
        "on_event": "each",
    }


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_has_prose_and_a_typed_signature(name: str) -> None:
    spec = SPECS[name]
    assert spec.combines in get_args(Combine)  # type: ignore[attr-defined]
    prose = inspect.getdoc(spec) or ""
    assert prose.partition("\n")[0].endswith(".")
    if name != "on_event":
        assert "When: " in prose
        assert "Returns" in prose
    signature = inspect.signature(spec)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in list(signature.parameters.values())[1:]:
        assert parameter.annotation is not inspect.Parameter.empty


@pytest.mark.parametrize("name", SPECS)
def test_the_plugin_set_has_a_method_for_every_hook(name: str) -> None:
    spec, method = inspect.signature(SPECS[name]), inspect.signature(getattr(PluginSet, name))
    assert list(method.parameters) == list(spec.parameters)
