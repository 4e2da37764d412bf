"""What the config may say, and what is refused with which words."""

from __future__ import annotations

import pytest
from hooktuner import hookimpl
from hooktuner.assemble import assemble
from hooktuner.draft import read_draft
from hooktuner.errors import ConfigError, PluginError
from hooktuner.events import RunStarted
from hooktuner.testing import ToyFamily, make_plugins, make_run
from hooktuner_crepa.options import CrepaOptions
from hooktuner_crepa.plugin import Crepa

ON = {"crepa_enabled": True, "crepa_encoder": "tiny"}


def start(tmp_path, family=ToyFamily, **keys):
    return make_run(make_plugins(family, "crepa"), None, tmp_path, **{**ON, **keys})


def refusal(tmp_path, **keys):
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, **keys)
    return str(caught.value)


def test_the_recommended_values_are_the_defaults():
    options = CrepaOptions()
    assert options.active() is None
    assert options.crepa_block_index == 8
    assert options.crepa_lambda == 0.5
    assert options.crepa_adjacent_distance == 1
    assert options.crepa_adjacent_tau == 1.0
    assert (options.crepa_encoder, options.crepa_encoder_image_size) == ("dinov2_vitg14", 518)
    assert CrepaOptions(crepa_enabled="true").active() is True
    assert CrepaOptions(crepa_enabled="false").active() is False


@pytest.mark.parametrize(("said", "active"), [("true", True), (False, False)])
def test_its_switch_activates_it(tmp_path, said, active):
    values = {
        "model_family": "toy", "max_train_steps": 1, "crepa_enabled": said, "crepa_encoder": "tiny",
        "data_backend_config": str(tmp_path / "none.json"),
    }  # fmt: skip
    assembled = assemble(read_draft(values, plugins=[ToyFamily]), with_datasets=False)
    assert ("crepa" in assembled.run.options) == active


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"crepa_encoder": "dinov2_vitb15"},
            'there is no encoder "dinov2_vitb15". Did you mean "dinov2_vitb14"? Known: dinov2_vitg14, ',
        ),
        ({"crepa_encoder": "./nowhere"}, "./nowhere is not a folder with a config.json. Correct the path."),
        ({"crepa_encoder_frames_batch_size": 0}, "0 frames are no batch. Use 1 or more, or -1 for all."),
        (
            {"crepa_feature_source": "backbone"},
            "crepa_teacher_block_index — is missing: with backbone features a deeper block is the teacher. "
            "Set it to a block after crepa_block_index (8).",
        ),
        (
            {"crepa_use_backbone_features": True, "crepa_teacher_block_index": 8},
            "block 8 is not deeper than crepa_block_index (8). Choose a deeper block as the teacher.",
        ),
        (
            {"crepa_teacher_block_index": 12},
            'the teacher is the vision encoder, not a block. Remove it, or set "crepa_feature_source": "backbone".',
        ),
        (
            {"crepa_use_backbone_features": True, "crepa_feature_source": "encoder", "crepa_teacher_block_index": 9},
            'is true while crepa_feature_source is "encoder": two teachers are named. Remove one of the two.',
        ),
        ({"crepa_adjacent_tau": 0}, "crepa_adjacent_tau"),
        ({"crepa_lambda": -0.1}, "crepa_lambda"),
        ({"crepa_similarity_threshold": 1.5}, "crepa_similarity_threshold"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, keys, words):
    assert words in refusal(tmp_path, **keys)


@pytest.mark.parametrize("encoder", ["dinov2_vits14", "owner/name", "tiny"])
def test_encoders_that_may_exist_pass(tmp_path, encoder):
    start(tmp_path, crepa_encoder=encoder)


def test_both_spellings_of_the_backbone(tmp_path):
    for keys in ({"crepa_feature_source": "backbone"}, {"crepa_use_backbone_features": "true"}):
        run = start(tmp_path, crepa_teacher_block_index=9, **keys)
        assert run.options["crepa"].source == "backbone"


def test_a_family_without_frames_is_refused(tmp_path):
    class Flat(ToyFamily):
        @hookimpl
        def describe_model(self, run):
            from dataclasses import replace

            return replace(super().describe_model(run), offers=frozenset({"blocks"}))

    with pytest.raises(PluginError, match=r"crepa \(hooktuner-crepa 0.1.0\) — needs frames of a model"):
        start(tmp_path, Flat)


def notes(tmp_path, **keys):
    run = start(tmp_path, **keys)
    Crepa().on_event(run, RunStarted())
    return [note for note in run.notes if "crepa" in note or "CREPA" in note]


def test_the_report_says_what_a_key_does_not_do(tmp_path):
    assert notes(tmp_path) == []
    assert notes(tmp_path, crepa_scheduler="polynomial", crepa_power=2, crepa_lambda_end=0.1) == []
    (drop,) = notes(tmp_path, crepa_drop_vae_encoder=True)
    assert "neither the VAE nor the vision encoder is in memory while training" in drop
    assert notes(tmp_path, crepa_decay_steps=5, crepa_power=2) == [
        "crepa_decay_steps has no effect: crepa_scheduler is constant.",
        "crepa_power has no effect: crepa_scheduler is not polynomial.",
    ]
    assert notes(tmp_path, crepa_threshold_mode="recoverable") == [
        "crepa_threshold_mode has no effect: crepa_similarity_threshold is not set."
    ]
    assert notes(tmp_path, crepa_lambda=0) == ["crepa_lambda is 0 in every step: CREPA changes nothing."]
    backbone = notes(tmp_path, crepa_feature_source="backbone", crepa_teacher_block_index=9, crepa_frame_map="last")
    assert "crepa_frame_map has no effect: the teacher is a block of the model." in backbone
