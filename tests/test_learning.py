"""It learns, and what it learned comes out of the official sampler; and the test fails when something is wrong."""

from __future__ import annotations

import shutil

import hooktuner
import pytest
from hooktuner import flow
from hooktuner_kandinsky5_video import latents
from learning import CAPTIONS, build_checkpoint, clip_latents, config_of, errors, sample, train

pytestmark = pytest.mark.slow

STEPS, RATE = 400, 3e-3
CLEAR = 7.0
"""How many times nearer the own clip must be. A correct run of `STEPS` steps reaches about 15."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny checkpoint that every test here starts from."""
    folder = tmp_path_factory.mktemp("learning")
    build_checkpoint(folder / "model")
    return folder


def full(place, name, **config):
    """A config of full training in its own run folder, on shared clips."""
    keys = {"model_type": "full", "max_train_steps": STEPS, "learning_rate": RATE, **config}
    return config_of(place / "run", place / "model", output_dir=str(place / name), **keys)


@pytest.fixture(scope="module")
def trained(place):
    """The checkpoint of a full training."""
    return train(full(place, "full"))


def separation(place, checkpoint, model=None):
    """How many times further the other clip is than the own one, sampled from a checkpoint."""
    return errors(
        sample(model or place / "model", checkpoint, CAPTIONS), clip_latents(place / "run", place / "model")
    ).separation


def test_full_training_separates_two_captions_in_the_official_sampler(place, trained):
    assert separation(place, None) < 2  # the random model knows neither
    assert separation(place, trained) > CLEAR


def test_a_lora_learns_to_swap_what_the_base_has_learned(place, trained):
    """The base is the fully trained model; the adapter is trained on the same clips with exchanged captions."""
    model = place / "base"
    shutil.copytree(place / "model", model, ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(trained / "transformer", model / "transformer")
    folder = place / "swapped"
    config = config_of(folder, model, model_type="lora", lora_rank=16, max_train_steps=250, learning_rate=5e-3)
    for number, caption in enumerate(reversed(CAPTIONS)):
        (folder / f"clips/clip{number}.txt").write_text(caption)
    own = list(reversed(clip_latents(folder, model)))  # each caption's own clip is now the other one
    assert errors(sample(model, None, CAPTIONS), own).separation < 1 / CLEAR
    assert errors(sample(model, train(config), CAPTIONS), own).separation > CLEAR


# --------------------------------------------- planted faults: the same training with one thing wrong is not enough


def test_a_wrong_sign_is_noticed(place, monkeypatch):
    monkeypatch.setattr(flow, "velocity", lambda latents, noise: latents - noise)
    assert separation(place, train(full(place, "sign"))) < CLEAR / 2


@pytest.mark.parametrize(
    "fault", [lambda value: value / 3, lambda value: value + 1], ids=["a wrong scale", "a wrong shift"]
)
def test_latents_with_a_fault_are_noticed(place, monkeypatch, fault, request):
    encode = latents.encode_clips
    monkeypatch.setattr(
        latents, "encode_clips", lambda *given: {name: fault(value) for name, value in encode(*given).items()}
    )
    name = request.node.callspec.id
    assert separation(place, train(full(place, name, cache_dir=str(place / f"cache {name}")))) < CLEAR / 2


def test_a_wrong_embedding_is_noticed(place):
    class SameForAll:
        """Every sample gets the embedding of the first one's caption."""

        name = "same-for-all"

        @hooktuner.hookimpl
        def prepare_input(self, run, step, predict):
            step.batch.text = [step.batch.text[0]] * len(step.batch.text)

    assert separation(place, train(full(place, "embedding"), [SameForAll])) < CLEAR / 2
