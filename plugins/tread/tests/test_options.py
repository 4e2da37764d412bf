"""The config keys: what is understood, and the sentences with which the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hooktuner.assemble import assemble
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError, ModelError, PluginError
from hooktuner.hookspecs import hookimpl
from hooktuner.testing import ToyFamily, load_denoiser, make_plugins, make_run
from hooktuner_tread.options import EXAMPLE, Route, TreadConfig, TreadOptions
from hooktuner_tread.plugin import Tread
from hooktuner_tread.routes import Span, resolve

ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}
BASE = {"model_family": "toy", "max_train_steps": 10, "data_backend_config": "datasets.json"}


def check(*, flags=(), plugins=(), family=ToyFamily, **config):
    assembled = assemble(read_draft({**BASE, **config}, flags, [family, *plugins]), with_datasets=False)
    assembled.plugins.close()
    return assembled


def problems(**how):
    with pytest.raises(ConfigError) as caught:
        check(**how)
    return [str(problem) for problem in caught.value.problems]


def route(**changes):
    return {"tread_config": {"routes": [{**ROUTE, **changes}]}}


# --------------------------------------------------------------------------------------------------- understood


def test_the_key_switches_the_plugin_on():
    assembled = check(**route())
    assert [plugin.name for plugin in assembled.plugins.plugins] == ["toy", "tread"]
    options = assembled.run.options_of("tread", TreadOptions)
    assert options.tread_config == TreadConfig(routes=(Route(**ROUTE),))


def test_without_the_key_the_plugin_is_off():
    assert [plugin.name for plugin in check().plugins.plugins] == ["toy"]


@pytest.mark.parametrize("as_flag", [True, False])
def test_the_value_as_text(as_flag):
    text = json.dumps({"routes": [ROUTE]})
    how = {"flags": ["--tread_config", text]} if as_flag else {"tread_config": text}
    assert check(**how).run.options_of("tread", TreadOptions) == check(**route()).run.options_of("tread", TreadOptions)


def test_numbers_as_text():
    options = check(**route(selection_ratio="0.25", start_layer_idx="1")).run.options_of("tread", TreadOptions)
    assert options.tread_config is not None
    assert options.tread_config.routes[0] == Route(selection_ratio=0.25, start_layer_idx=1, end_layer_idx=-2)


def test_the_example_in_messages_and_the_shipped_example_are_right():
    assert TreadOptions.model_validate({"tread_config": EXAMPLE}).active()
    example = json.loads((Path(__file__).parent.parent / "examples" / "tread.json").read_text(encoding="utf-8"))
    assert check(**example).run.options_of("tread", TreadOptions).tread_disable_after == 0.85


@pytest.mark.parametrize(
    ("keys", "share"), [({}, 0.85), ({"model_type": "full"}, 1.0), ({"tread_disable_after": 0.5}, 0.5)]
)
def test_the_share_of_the_run(keys, share):
    run = check(**route(), **keys).run
    assert run.options_of("tread", TreadOptions).share(run) == share


# ------------------------------------------------------------------------------------------------------ refused


PLACE = "config: tread_config.routes[0]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection_ratio": 1}, f"{PLACE}.selection_ratio — must be below 1, not 1."),
        ({"selection_ratio": -0.1}, f"{PLACE}.selection_ratio — must be at least 0, not -0.1."),
        ({"selection_ratio": True}, f"{PLACE}.selection_ratio — must be a number, not true."),
        ({"selection_ratio": "half"}, f'{PLACE}.selection_ratio — must be a number, not "half".'),
        ({"selection_ratio": float("nan")}, f"{PLACE}.selection_ratio — must be a finite number, not NaN."),
        ({"start_layer_idx": False}, f"{PLACE}.start_layer_idx — must be a number, not false."),
        ({"start_layer_idx": 1.5}, f"{PLACE}.start_layer_idx — must be a whole number, not 1.5."),
        ({"end_layer": 3}, f'{PLACE}.end_layer — unknown option. Did you mean "end_layer_idx"?'),
        (
            {"end_layer_idx": -1},
            f"{PLACE} — end_layer_idx -1 is the last block: dropped tokens would leave the model straight from the "
            "start of the route. End it earlier; -4 is what the paper found best.",
        ),
        (
            {"start_layer_idx": -2, "end_layer_idx": -4},
            f"{PLACE} — the route starts at block -2, behind its end -4 (inclusive). Swap start_layer_idx and "
            "end_layer_idx.",
        ),
    ],
)
def test_wrong_routes(changes, message):
    assert problems(**route(**changes)) == [message]


def test_what_is_missing_is_named():
    assert problems(tread_config={"routes": [{"selection_ratio": 0.5}]}) == [
        f"{PLACE}.start_layer_idx — is missing. Add it.",
        f"{PLACE}.end_layer_idx — is missing. Add it.",
    ]
    assert problems(tread_config={}) == ["config: tread_config.routes — is missing. Add it."]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"routes": []},
            "config: tread_config.routes — there is no route. Write at least one, or remove tread_config.",
        ),
        ({"routes": ROUTE}, "config: tread_config.routes — must be a list, not "),
        ({"routes": [ROUTE], "route": 1}, 'config: tread_config.route — unknown option. Did you mean "routes"?'),
        (True, "config: tread_config — must be an object {…}, not true."),
        ([ROUTE], "config: tread_config — must be an object {…}, not "),
        ("routes", "config: tread_config — this text is not JSON (column 1: expecting value). Write {"),
        ("[1]", "config: tread_config — must be an object {…}, not "),
        (
            json.dumps({"routes": [ROUTE, {**ROUTE, "selection_ratio": 2}]}),
            "config: tread_config — routes[1].selection_ratio — must be below 1, not 2.",
        ),
    ],
)
def test_wrong_values(value, message):
    (found,) = problems(tread_config=value)
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("ends", "overlap"),
    [
        (((0, 3), (3, 5)), True),
        (((3, 5), (0, 3)), True),
        (((0, 8), (2, 4)), True),
        (((-8, -5), (-5, -3)), True),
        (((0, 2), (3, 5)), False),
        (((-8, -5), (-4, -2)), False),
        (((0, 2), (-5, -2)), False),
    ],
)
def test_overlapping_routes(ends, overlap):
    value = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": a, "end_layer_idx": b} for a, b in ends]}
    if not overlap:
        check(tread_config=value)
        return
    (one, two), (three, four) = ends
    assert problems(tread_config=value) == [
        f"config: tread_config — routes[0] (blocks {one} to {two}) and routes[1] (blocks {three} to {four}) overlap; "
        "ends are inclusive. Let each block be in one route."
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "config: tread_disable_after — must be above 0, not 0."),
        (1.5, "config: tread_disable_after — must be at most 1, not 1.5."),
        (True, "config: tread_disable_after — true is not possible here (number, above 0, at most 1)."),
    ],
)
def test_wrong_shares(value, message):
    assert problems(**route(), tread_disable_after=value) == [message]


def test_active_without_routes():
    assert problems(plugins=["tread"]) == [
        f"config: tread_config — is missing, and the plugin tread is active. Set it to {EXAMPLE}."
    ]


def test_the_second_key_alone_does_not_switch_it_on():
    (found,) = problems(tread_disable_after=0.5)
    assert "tread_disable_after" in found
    assert "--plugin tread" in found


def test_a_family_without_routing_is_refused():
    class Whole(ToyFamily):
        @hookimpl
        def describe_model(self, run):
            from dataclasses import replace

            return replace(super().describe_model(run), offers=frozenset({"blocks", "frames"}))

    with pytest.raises((ConfigError, PluginError)) as caught:
        check(**route(), family=Whole)
    assert "needs token_routing of a model, and toy" in str(caught.value)
    assert "Train without tread." in str(caught.value)


# ------------------------------------------------------------------------------------------------- on a real model


def spans(*ends, blocks=8):
    value = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": a, "end_layer_idx": b} for a, b in ends]}
    return resolve(TreadConfig.model_validate(value), blocks, "toy (toy)")


def test_block_numbers():
    assert spans((2, -2)) == (Span(0, 2, 6, 0.5),)
    assert spans((-3, -2), (0, 4)) == (Span(1, 0, 4, 0.5), Span(0, 5, 6, 0.5))
    assert spans((-8, -8)) == (Span(0, 0, 0, 0.5),)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (
            [(2, 9)],
            "tread_config.routes[0].end_layer_idx — there is no block 9: toy (toy) has 8 blocks. Choose from 0 to 7, "
            "or from -1 to -8 counted from the end.",
        ),
        (
            [(-9, 3)],
            "tread_config.routes[0].start_layer_idx — there is no block -9: toy (toy) has 8 blocks. Choose from 0 to "
            "7, or from -1 to -8 counted from the end.",
        ),
        (
            [(0, 1), (6, -4)],
            "tread_config.routes[1] — with the 8 blocks of toy (toy) the route starts at block 6, behind its end 4 "
            "(inclusive). Lower start_layer_idx or raise end_layer_idx.",
        ),
        (
            [(2, 7)],
            "tread_config.routes[0].end_layer_idx — block 7 is the last one of toy (toy): dropped tokens would leave "
            "the model straight from the start of the route. End the route at block 6 or earlier.",
        ),
        (
            [(0, 4), (-4, -2)],
            "tread_config — on the 8 blocks of toy (toy), routes[0] (blocks 0 to 4) and routes[1] (blocks 4 to 6) "
            "overlap; ends are inclusive. Let each block be in one route.",
        ),
    ],
)
def test_routes_that_the_model_cannot_do(ends, message):
    with pytest.raises(ModelError) as caught:
        spans(*ends)
    assert str(caught.value) == message


def test_all_problems_at_once():
    with pytest.raises(ModelError) as caught:
        spans((0, 9), (12, -2))
    assert len(str(caught.value).splitlines()) == 2


def test_the_plugin_checks_the_model(tmp_path):
    plugins = make_plugins(ToyFamily, Tread())
    run = make_run(plugins, "toy", tmp_path, **route(start_layer_idx=3))
    with pytest.raises(
        ModelError, match=r"with the 4 blocks of toy \(toy\) the route starts at block 3, behind its end 2"
    ):
        plugins.intercept_blocks(run, load_denoiser(run, plugins))


def test_the_start_report_says_what_is_routed(tmp_path):
    plugins = make_plugins(ToyFamily, Tread())
    run = make_run(plugins, "toy", tmp_path, **route(start_layer_idx=1, selection_ratio=0.25))
    plugins.intercept_blocks(run, load_denoiser(run, plugins))
    assert run.notes[-1:] == ["tread: blocks 1 to 2 of 4 work on 75% of the tokens, for the first 85% of the steps."]
