"""The plugin in whole runs on the toy family."""

from __future__ import annotations

import io
import json

import hooktuner
import pytest
import torch
from hooktuner.events import StepFinished
from hooktuner.hookspecs import hookimpl
from hooktuner.testing import PluginConformance, ToyFamily, make_project
from hooktuner_tread.plugin import Tread
from rich.console import Console
from safetensors import safe_open

ROUTES = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}
NOTHING = {"routes": [{"selection_ratio": 0.0, "start_layer_idx": 1, "end_layer_idx": -2}]}


class TestConformance(PluginConformance):
    """The rules that every plugin keeps. Resuming is compared with routing always on, because the check makes the run
    longer when it resumes, and the end of routing is a share of the run."""

    plugin = "tread"
    options = {"tread_config": ROUTES, "tread_disable_after": 1.0}  # noqa: RUF012
    neutral = {"tread_config": NOTHING, "tread_disable_after": 1.0}  # noqa: RUF012


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOKTUNER_HOME", str(tmp_path / "home"))


def train(folder, *, plugins=(), **config):
    """A run on two clips. config: further keys."""
    path = make_project(folder, max_train_steps=4, **config)
    return hooktuner.run(path, plugins=[ToyFamily(), *plugins], console=Console(file=io.StringIO()))


def tensors(result):
    return {file.name: file.read_bytes() for file in sorted(result.checkpoint.rglob("*.safetensors"))}


def test_routing_matters_and_ends_at_its_share(tmp_path):
    """Losses differ from a plain run's while tokens are routed, and from a longer routed run's behind the share."""
    plain = train(tmp_path / "plain").losses
    routed = train(tmp_path / "routed", tread_config=ROUTES, tread_disable_after=0.5).losses
    assert routed[0] != plain[0]
    longer = train(tmp_path / "longer", tread_config=ROUTES, tread_disable_after=1.0).losses
    assert longer[:2] == routed[:2]
    assert longer[2] != routed[2]


class Stopper:
    """Stops a run after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    @hookimpl
    def on_event(self, event):
        if isinstance(event, StepFinished) and event.result.number == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_a_run_that_was_killed_goes_on_exactly(tmp_path, model_type):
    """Also across the end of routing: steps 1 to 3 of 4 are routed."""
    keys = {
        "tread_config": ROUTES,
        "tread_disable_after": 0.75,
        "model_type": model_type,
        "gradient_accumulation_steps": 2,
        "checkpoint_step_interval": 1,
    }
    whole = train(tmp_path / "whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", plugins=[Stopper(2)], **keys)
    parts = train(tmp_path / "parts", **keys)
    assert len(parts.losses) < 4
    assert parts.losses == whole.losses[-len(parts.losses) :]
    assert tensors(parts) == tensors(whole)


def test_every_step_is_routed(tmp_path):
    """No step has the loss that it has without dropped tokens."""
    routed = train(tmp_path / "routed", tread_config=ROUTES, tread_disable_after=1.0).losses
    neutral = train(tmp_path / "neutral", tread_config=NOTHING, tread_disable_after=1.0).losses
    assert all(one != other for one, other in zip(routed, neutral, strict=True))


def test_validation_samples_without_routing(tmp_path):
    """What the untrained model samples in a run with routing, before its first step, is what it samples without."""
    validation = {
        "validation_disable": False,
        "validation_at_start": True,
        "validation_prompt": "a dog",
        "validation_num_inference_steps": 2,
        "validation_step_interval": 100,
    }
    found = []
    for name, keys in (("plain", {}), ("routed", {"tread_config": ROUTES, "tread_disable_after": 1.0})):
        result = train(tmp_path / name, **validation, **keys)
        media = {path.parent.name: path.read_bytes() for path in (result.output_dir / "validation").rglob("*.*")}
        assert set(media) == {"step-000000", "step-000004"}
        found.append(media)
    assert found[0]["step-000000"] == found[1]["step-000000"]
    assert found[0]["step-000004"] != found[1]["step-000004"], "the comparison would notice another model"


def test_adapters_hold_nothing_of_it(tmp_path):
    names = []
    for name, keys in (("plain", {}), ("routed", {"tread_config": ROUTES})):
        result = train(tmp_path / name, **keys)
        state = json.loads((result.checkpoint / "state" / "run.json").read_text())
        assert state["regularizers"] == {}
        found = {}
        for file in sorted(result.checkpoint.rglob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                found[file.name] = {key: opened.get_tensor(key).shape for key in opened.keys()}  # noqa: SIM118
        names.append(found)
    assert names[0] == names[1]
    assert all(isinstance(shape, torch.Size) for shapes in names[0].values() for shape in shapes.values())


def test_however_it_is_switched_on(tmp_path):
    """By key, by name and as an object, the plugin is the same."""
    by_key = train(tmp_path / "key", tread_config=ROUTES)
    by_name = train(tmp_path / "name", tread_config=ROUTES, plugins=["tread"])
    by_object = train(tmp_path / "object", tread_config=ROUTES, plugins=[Tread()])
    assert by_key.losses == by_name.losses == by_object.losses
