"""What the keys switch, and what is refused, in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hooktuner.assemble import assemble
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError
from hooktuner.testing import ToyFamily, make_plugins, make_run
from hooktuner_scheduled_sampling.options import ScheduledSamplingOptions
from hooktuner_scheduled_sampling.plugin import _remarks

KEY = "scheduled_sampling_"


def plan(plugins=(), **keys):
    values = {
        "max_train_steps": 5,
        "data_backend_config": "d.json",
        **{KEY + name: value for name, value in keys.items()},
    }
    return assemble(read_draft(values, plugins=[ToyFamily, *plugins]), with_datasets=False)


def refusal(plugins=(), **keys):
    with pytest.raises(ConfigError) as caught:
        plan(plugins, **keys)
    return str(caught.value)


def active(**keys):
    assembled = plan(**keys)
    assembled.plugins.close()
    return [plugin.name for plugin in assembled.plugins.plugins]


def test_a_positive_offset_switches_the_plugin_on_and_zero_leaves_it_off():
    assert active(max_step_offset=10, probability=0.5) == ["toy", "scheduled-sampling"]
    assert active(max_step_offset="10") == ["toy", "scheduled-sampling"]
    assert active(max_step_offset=0, probability=0.5) == ["toy"]


def test_the_defaults_are_off_and_reflexflow_is_not_on_by_itself():
    options = ScheduledSamplingOptions(scheduled_sampling_max_step_offset=10)
    assert options.probability(1) == 0
    assert options.scheduled_sampling_reflexflow is None
    assert (options.drift_weight, options.frequency_strength, options.forwards) == (0, 0, 1)
    assert ScheduledSamplingOptions().active() is None


def test_a_config_with_every_key_is_accepted():
    names = {
        "max_step_offset": 30,
        "inference_steps": 40,
        "prob_start": 0.0,
        "prob_end": 0.25,
        "ramp_steps": 500,
        "start_step": 100,
        "ramp_shape": "cosine",
        "strategy": "biased_early",
        "sampler": "dpm",
        "order": 3,
        "target": "to_data",
        "reflexflow": "true",
        "reflexflow_alpha": 1,
        "reflexflow_beta1": 10,
        "reflexflow_beta2": 1,
    }
    assert set(ScheduledSamplingOptions.model_fields) == {KEY + name for name in [*names, "probability"]}
    assert active(**names) == ["toy", "scheduled-sampling"]


RAMP = "without scheduled_sampling_ramp_steps there is no ramp, so it does nothing. Set scheduled_sampling_ramp_steps, "
OFF = (
    'scheduled_sampling_reflexflow is off, so it does nothing. Set "scheduled_sampling_reflexflow": true, or remove it.'
)


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"prob_start": 0.1}, "prob_start", RAMP),
        ({"prob_end": 0.1, "ramp_steps": 0}, "prob_end", RAMP),
        ({"start_step": 4}, "start_step", RAMP),
        ({"ramp_shape": "cosine"}, "ramp_shape", RAMP),
        (
            {"probability": 0.2, "prob_start": 0.0, "ramp_steps": 5},
            "probability",
            "scheduled_sampling_prob_start already says where the ramp starts, so it does nothing. "
            "Remove one of the two.",
        ),
        (
            {"sampler": "euler", "order": 2},
            "order",
            'the Euler solver has order 1, not 2. Remove it, or set "scheduled_sampling_sampler" to "unipc" or "dpm".',
        ),
        ({"reflexflow_alpha": 1}, "reflexflow_alpha", OFF),
        ({"reflexflow_beta1": 1, "reflexflow": False}, "reflexflow_beta1", OFF),
        ({"reflexflow_beta2": 1}, "reflexflow_beta2", OFF),
        (
            {"reflexflow": True, "reflexflow_alpha": 0, "reflexflow_beta1": 0},
            "reflexflow",
            "with alpha 0, beta1 0 and beta2 1 it adds nothing to the loss. Change one of them, or set it to false.",
        ),
        (
            {"reflexflow": True, "reflexflow_alpha": 1, "reflexflow_beta2": 0},
            "reflexflow_alpha",
            "scheduled_sampling_reflexflow_beta2 is 0, so there is no flow loss of rolled-out samples to weigh. "
            "Set it to 0, or beta2 above 0.",
        ),
        ({"sampler": "heun"}, "sampler", 'must be one of euler, unipc, dpm, not "heun"'),
        ({"order": 4}, "order", "must be at most 3, not 4"),
        ({"probability": 1.5}, "probability", "must be at most 1, not 1.5"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(keys, key, words):
    text = refusal(max_step_offset=10, **keys)
    assert f"{KEY}{key} — {words}" in text
    assert len(text.splitlines()) == 1


def test_an_offset_outside_the_schedule_is_refused():
    assert "scheduled_sampling_max_step_offset — must be at most 999, not 1000" in refusal(max_step_offset=1000)
    assert "scheduled_sampling_max_step_offset — must be at least 0, not -1" in refusal(max_step_offset=-1)


def test_the_plugin_by_name_needs_an_offset():
    text = refusal(["scheduled-sampling"], probability=0.5)
    assert (
        "scheduled_sampling_max_step_offset — the plugin scheduled-sampling is active, and nothing says where its "
        "rollouts start. Set it to the largest offset in thousandths of the schedule, such as 20, or remove the plugin."
    ) in text
    assert "asked for by name" in refusal(["scheduled-sampling"], max_step_offset=0)


def test_keys_without_the_switch_say_which_plugin_is_off():
    assert "belongs to the plugin scheduled-sampling" in refusal(probability=0.5)


def test_the_start_report_says_what_a_step_costs():
    def remarks(total=100, **keys):
        return _remarks(ScheduledSamplingOptions(**{KEY + name: value for name, value in keys.items()}), total)

    never = ["scheduled-sampling never rolls out: the probability is 0 in every step."]
    assert remarks(max_step_offset=10) == never
    assert remarks(max_step_offset=10, ramp_steps=10, start_step=100) == never
    assert remarks(max_step_offset=10, ramp_steps=10, start_step=98) != never
    assert remarks(None, max_step_offset=10, ramp_steps=10, start_step=98) != never
    one, euler = remarks(max_step_offset=10, probability=0.5)
    assert one == (
        "scheduled-sampling: 1 more forward pass without gradients per micro-batch in steps whose probability is not 0."
    )
    assert euler == "scheduled-sampling: rollouts are one step long, for which every solver is the Euler step."
    (three,) = remarks(max_step_offset=30, probability=0.5, reflexflow=True)
    assert "3 more forward passes" in three


def test_the_start_report_of_a_run_has_the_remark(tmp_path):
    plugins = make_plugins(ToyFamily, "scheduled-sampling")
    run = make_run(plugins, None, tmp_path, scheduled_sampling_max_step_offset=10)
    plugins.regularizer(run, None)
    assert "scheduled-sampling never rolls out: the probability is 0 in every step." in run.notes


def test_the_examples_are_accepted():
    folder = Path(__file__).parents[1] / "examples"
    values = json.loads((folder / "config.json").read_text())
    own = {key: value for key, value in values.items() if key.startswith(KEY)}
    assert own
    values = {"max_train_steps": 2000, "data_backend_config": "d.json", **own}
    assembled = assemble(read_draft(values, plugins=[ToyFamily]), with_datasets=False)
    assembled.plugins.close()
    assert assembled.run.options["scheduled-sampling"].active()
