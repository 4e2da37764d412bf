"""It learns, and what it learned comes out of the official sampler; and the test fails when something is wrong."""

from __future__ import annotations

import shutil

import hooktuner
import pytest
from hooktuner import flow
from learning import CAPTIONS, build_checkpoint, clip_latents, config_of, errors, sample, train

pytestmark = pytest.mark.slow

STEPS = 400
CLEAR = 5.0
"""How many times nearer the own clip must be. A correct run reaches more than 10."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny checkpoint that every test here starts from."""
    folder = tmp_path_factory.mktemp("learning")
    build_checkpoint(folder / "model")
    return folder


def full(place, name, **config):
    """A config of full training in its own run folder, on shared clips and caches."""
    keys = {"model_type": "full", "max_train_steps": STEPS, "learning_rate": 2e-3, **config}
    return config_of(place / "run", place / "model", output_dir=str(place / name), **keys)


@pytest.fixture(scope="module")
def trained(place):
    """(config, checkpoint) after full training."""
    config = full(place, "full")
    return config, train(config)


def separation(place, config, checkpoint, model=None):
    return errors(sample(model or place / "model", checkpoint, CAPTIONS), clip_latents(config)).separation


def test_full_training_separates_two_captions_in_the_official_sampler(place, trained):
    config, checkpoint = trained
    assert separation(place, config, None) < 2  # the random model knows neither
    assert separation(place, config, checkpoint) > CLEAR


def test_a_lora_learns_to_swap_what_the_base_has_learned(place, trained):
    """The base is the fully trained model; the adapter is trained on the same clips with exchanged captions."""
    _, base = trained
    model = place / "base"
    shutil.copytree(place / "model", model)
    shutil.rmtree(model / "transformer")
    shutil.copytree(base / "transformer", model / "transformer")
    folder = place / "swapped"
    config = config_of(
        folder, model, model_type="lora", lora_rank=16, max_train_steps=250, learning_rate=5e-3, flow_schedule_shift=5.0
    )
    for number, caption in enumerate(reversed(CAPTIONS)):
        (folder / f"clips/clip{number}.txt").write_text(caption)
    clips = list(reversed(clip_latents(config)))  # each caption's own clip is now the other one
    before = errors(sample(model, None, CAPTIONS), clips).separation
    after = errors(sample(model, train(config), CAPTIONS), clips).separation
    assert before < 1 / CLEAR
    assert after > CLEAR


# ------------------------------------------------------------------------------------- three faults, each is noticed


def test_a_flipped_target_is_noticed(place, trained, monkeypatch):
    monkeypatch.setattr(flow, "velocity", lambda latents, noise: latents - noise)
    config = full(place, "flipped", max_train_steps=STEPS // 2)
    assert separation(place, config, train(config)) < CLEAR


def test_a_wrong_timestep_scale_is_noticed(place, trained, monkeypatch):
    monkeypatch.setattr(flow, "TIMESTEP_SCALE", 1.0)
    config = full(place, "timestep", max_train_steps=STEPS // 2)
    assert separation(place, config, train(config)) < CLEAR


def test_an_embedding_that_is_not_the_captions_is_noticed(place, trained):
    class SameForAll:
        """Every sample gets the embedding of the first one's caption."""

        name = "same-for-all"

        @hooktuner.hookimpl
        def prepare_input(self, run, step, predict):
            step.batch.text = [step.batch.text[0]] * len(step.batch.text)

    config = full(place, "embedding", max_train_steps=STEPS // 2)
    assert separation(place, config, train(config, [SameForAll])) < CLEAR
