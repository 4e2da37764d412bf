"""CREPA in the kernel of the toy model: gradients, routing, several calls, given frames, schedules, whole runs."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import hooktuner
import numpy as np
import pytest
import torch
from hooktuner import hookimpl
from hooktuner.errors import ModelError
from hooktuner.family import BlockTokens, Grid
from hooktuner.randomness import generator
from hooktuner.technique import BlockCall, BlockInterceptor
from hooktuner.testing import ToyAnatomy, ToyFamily, make_project
from hooktuner_crepa.capture import capture, raster_places
from hooktuner_crepa.plugin import Crepa
from rich.console import Console
from safetensors.torch import load_file

GRID = (3, 2, 4)
"""Of the bench's clips."""
FEATURES = "crepa/patches"


class Route(BlockInterceptor):
    """Routes all but `keep` random tokens around the blocks `first` … `last`. The same tokens in every step."""

    stage = "route"

    def __init__(self, first, last, keep=11):
        self.first, self.last, self.keep = first, last, keep

    def call(self, call, proceed):
        if call.index is None or not self.first <= call.index <= self.last:
            return proceed(call)
        if call.index == self.first:
            self.full = call.args[0]
            batch, tokens, _ = self.full.shape
            rows = range(batch) if call.step.rows is None else call.step.rows
            drawn = [torch.randperm(tokens, generator=generator(0, "route", row)) for row in rows]
            self.kept = torch.stack([order[: self.keep].sort().values for order in drawn])
            hidden = self.full.gather(1, self.kept[..., None].expand(-1, -1, self.full.shape[2]))
        else:
            hidden = call.args[0]
        rope = call.anatomy.read(call.args).sides[0][0]
        rope = rope.expand(len(self.kept), -1, -1, -1)
        rope = rope.gather(1, self.kept[..., None, None].expand(-1, -1, *rope.shape[2:]))
        args = call.anatomy.write(call.args, BlockTokens(hidden, ((rope, 1),), None), self.kept)
        output = proceed(replace(call, args=args, kept_BK=self.kept))
        if call.index < self.last:
            return output
        return self.full.scatter(1, self.kept[..., None].expand(-1, -1, output.shape[2]), output)


class Split(ToyFamily):
    """Calls its denoiser once per sample, the last sample first."""

    name = "toy"

    @hookimpl
    def predict(self, run, denoiser, step):
        answers = {}
        for row in reversed(range(len(step.batch.index))):
            step.rows = [row]
            part = replace(
                step,
                batch=replace(step.batch, text=[step.batch.text[row]]),
                noisy_BCFHW=step.noisy_BCFHW[[row]],
                timestep_B=step.timestep_B[[row]],
                conditioning=None,
            )
            answers[row] = super().predict(run, denoiser, part)
        step.rows = None
        return torch.cat([answers[row] for row in range(len(answers))])


def projected(bench, tokens):
    """What the projector makes of tokens, in float64."""
    network = bench.kernel.regularizers["crepa"].modules()["projector"].double()
    with torch.no_grad():
        answer = network(tokens.detach().double())
    network.float()
    return answer


# ------------------------------------------------------------------------------------------------------- the term


def test_the_term_and_its_metrics_are_those_of_the_reference(bench, expected):
    made = bench(crepa_lambda=0.3, crepa_adjacent_tau=0.8)
    batch = made.batch()
    step, notes, terms = made.backward(batch)
    (tokens,) = made.taps.outputs[1]
    student, features = projected(made, tokens), batch.features[FEATURES]
    total = expected(student, features, GRID, tau=0.8).mean()
    own = expected(student, features, GRID, d=0).mean()
    assert terms["crepa"].item() == pytest.approx(-0.3 * total, abs=1e-6)
    assert notes.metrics["similarity"].item() == pytest.approx(own, abs=1e-6)
    assert notes.metrics["neighbours"].item() == pytest.approx(total - own, abs=1e-6)
    assert notes.metrics["weight"].item() == pytest.approx(0.3)
    assert "crepa" not in step.notes, "hidden states are kept after the step"


@pytest.mark.parametrize(
    "keys",
    [
        {"crepa_adjacent_distance": 2, "crepa_cumulative_neighbors": True, "crepa_normalize_neighbour_sum": True},
        {"crepa_spatial_align": False, "crepa_normalize_by_frames": False, "crepa_adjacent_distance": 2},
    ],
    ids=["cumulative", "global"],
)
def test_every_key_of_the_loss_reaches_it(bench, expected, keys):
    made = bench(**keys)
    batch = made.batch()
    _, _, terms = made.backward(batch)
    case = {
        "d": 2,
        "cumulative": "crepa_cumulative_neighbors" in keys,
        "normalize_sum": "crepa_normalize_neighbour_sum" in keys,
        "spatial": "crepa_spatial_align" not in keys,
        "mean_over_frames": "crepa_normalize_by_frames" not in keys,
    }
    total = expected(projected(made, made.taps.outputs[1][0]), batch.features[FEATURES], GRID, **case).mean()
    assert terms["crepa"].item() == pytest.approx(-0.5 * total, abs=1e-6)


def test_every_token_of_the_block_and_the_projector_get_a_gradient_and_later_blocks_none(bench):
    made = bench()
    step = made.kernel.draw(made.batch(), 1, 0)
    with made.kernel.runner.during(step):
        step.prediction_BCFHW = made.kernel.predict(step)
        made.kernel.losses(step)["crepa"].backward()
    norms = made.taps.outputs[1][0].grad.norm(dim=-1)
    assert (norms > 1e-3 * norms.median()).all()
    assert made.taps.outputs[2][0].grad is None
    found = made.gradients()
    assert {name for name in found if name.startswith("regularizer.crepa.")} == {
        f"regularizer.crepa.projector.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")
    }
    changed = [name for name, value in found.items() if "lora_B" in name and value.abs().max() > 0]
    assert changed
    assert not [name for name in changed if name.startswith(("blocks.2", "blocks.3"))]


def test_gradients_are_the_same_with_and_without_recomputation(bench, tmp_path):
    answers = []
    for on in (True, False):
        made = bench(gradient_checkpointing=on)
        _, _, terms = made.backward(made.batch())
        answers.append((terms["crepa"].item(), made.gradients()))
    assert answers[0][0] == answers[1][0]
    assert all(torch.equal(value, answers[1][1][name]) for name, value in answers[0][1].items())
    assert answers[0][1].keys() == answers[1][1].keys()


# -------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 1), (1, 3), (2, 3)])
def test_with_routed_tokens_the_teacher_is_gathered_at_those_that_are_there(bench, expected, first, last):
    made = bench(Route(first, last))
    batch = made.batch()
    _, _, terms = made.backward(batch)
    (tokens,), (kept,) = made.taps.outputs[1], made.taps.kept[1]
    if first <= 1:
        assert tokens.shape[1] == 11
        assert not torch.equal(kept[0], kept[1])
    total = expected(projected(made, tokens), batch.features[FEATURES], GRID, kept=kept).mean()
    assert terms["crepa"].item() == pytest.approx(-0.5 * total, abs=1e-6)
    assert (tokens.grad.norm(dim=-1) > 0).all()


def test_a_routed_backbone_teacher_lends_only_what_it_has(bench):
    """Student outside the route, teacher inside: against a sum by loops."""
    made = bench(
        Route(2, 3), crepa_feature_source="backbone", crepa_teacher_block_index=2, crepa_normalize_neighbour_sum=True
    )
    _, _, terms = made.backward(made.batch())
    student = projected(made, made.taps.outputs[1][0]).numpy()
    (teacher,), (kept,) = made.taps.outputs[2], made.taps.kept[2]
    teacher, values = teacher.detach().double().numpy(), []
    for b in range(2):
        there = {int(place): teacher[b, n] / np.linalg.norm(teacher[b, n]) for n, place in enumerate(kept[b])}
        for place in range(24):
            near = {place: 1.0, place - 8: np.exp(-1), place + 8: np.exp(-1)}
            token = student[b, place] / np.linalg.norm(student[b, place])
            found = [(weight, token @ there[at]) for at, weight in near.items() if at in there]
            norm = sum(weight for weight, _ in found)
            values.append(sum(weight * cos for weight, cos in found) / norm if found else 0.0)
    assert terms["crepa"].item() == pytest.approx(-0.5 * np.mean(values), abs=1e-6)


class Backwards(ToyAnatomy):
    """A model whose sequence runs from the last token to the first."""

    def to_grid(self, tokens_BND, args):
        return super().to_grid(tokens_BND.flip(1), args)


def test_places_follow_the_models_own_order_of_tokens():
    args = (torch.zeros(2, 24, 4), None, None, torch.zeros(1, *GRID, 2, 2), None)
    assert raster_places(ToyAnatomy(), args, Grid(*GRID)).tolist() == list(range(24))
    assert raster_places(Backwards(), args, Grid(*GRID)).tolist() == list(range(23, -1, -1))
    tokens = torch.arange(24.0).expand(2, -1)[..., None]

    class Step:
        rows = (0, 1)
        batch = type("Batch", (), {"index": (0, 1)})

    whole = capture(BlockCall(None, 1, args, Backwards(), Step()), tokens)
    assert whole.places_BK is None
    assert whole.tokens_BKD[0, :, 0].tolist() == list(range(23, -1, -1))
    kept = torch.tensor([[0, 5], [1, 23]])
    part = capture(BlockCall(None, 1, args, Backwards(), Step(), kept, first_args=args), tokens[:, :2])
    assert part.places_BK.tolist() == [[23, 18], [22, 0]]


def test_an_output_that_is_no_sequence_of_tokens_is_refused():
    args = (torch.zeros(2, 24, 4), None, None, torch.zeros(1, *GRID, 2, 2), None)

    class Step:
        rows = (0, 1)

    with pytest.raises(ModelError, match="block 3 does not answer one tensor of tokens"):
        capture(BlockCall(None, 3, args, ToyAnatomy(), Step()), (torch.zeros(2, 24, 4), None))


# ------------------------------------------------------------------------------ several calls, given frames, rows


@pytest.mark.parametrize("route", [None, (1, 2)])
def test_a_batch_split_into_several_calls_is_put_together(bench, expected, route):
    made = bench(*([Route(*route)] if route else []), family=Split)
    batch = made.batch(("one", "two", "three"))
    _, _, terms = made.backward(batch)
    assert [len(part) for part in made.taps.outputs[1]] == [1, 1, 1]
    tokens = torch.cat(made.taps.outputs[1][::-1])
    kept = torch.cat(made.taps.kept[1][::-1]) if route else None
    total = expected(projected(made, tokens), batch.features[FEATURES], GRID, kept=kept).mean()
    assert terms["crepa"].item() == pytest.approx(-0.5 * total, abs=1e-6)


def test_given_first_frames_are_no_students_but_remain_teachers(bench, expected):
    made = bench(flavour="toy-i2v", toy_first_frame_probability=0.5)
    batch = made.batch(tuple("abcd"))
    step, _, terms = made.backward(batch)
    given = step.conditioning.given_B1FHW[:, 0, 0, 0, 0]
    assert 0 < given.sum() < 4
    counted = torch.ones(4, 3, dtype=torch.bool)
    counted[:, 0] = ~given
    student = projected(made, made.taps.outputs[1][0])
    total = expected(student, batch.features[FEATURES], GRID, counted=counted).mean()
    assert terms["crepa"].item() == pytest.approx(-0.5 * total, abs=1e-6)
    grad = made.kernel.regularizers["crepa"].modules()["projector"][1].weight.grad
    assert torch.isfinite(grad).all()


def test_a_block_that_is_skipped_is_an_error_and_not_silence(bench):
    class Skip(BlockInterceptor):
        stage = "route"

        def call(self, call, proceed):
            return call.args[0] if call.index == 1 else proceed(call)

    made = bench(Skip())
    with pytest.raises(ModelError, match="block 1 or the teacher's was not called once for every sample of step 1"):
        made.backward(made.batch())


@pytest.mark.parametrize("key", ["crepa_block_index", "crepa_teacher_block_index"])
def test_a_block_that_is_not_there_is_refused_with_the_number_of_blocks(bench, key):
    keys = {"crepa_feature_source": "backbone", "crepa_block_index": 1, "crepa_teacher_block_index": 2, key: 4}
    if key == "crepa_block_index":
        keys["crepa_teacher_block_index"] = 5
    with pytest.raises(ModelError, match=f"{key} — there is no block 4: toy toy has 4 blocks, 0 to 3"):
        bench(**keys)


# ------------------------------------------------------------------------------------------------------ schedules


def test_the_weight_follows_the_schedule_and_off_means_no_capture(bench):
    made = bench(crepa_lambda=0.4, crepa_warmup_steps=2, crepa_cutoff_step=2)
    batch = made.batch()
    results = []
    for number in (1, 2, 3):
        before = made.kernel.regularizers["crepa"].modules()["projector"][1].weight.clone()
        results.append(made.step(batch, number=number).wait())
        moved = not torch.equal(before, made.kernel.regularizers["crepa"].modules()["projector"][1].weight)
        assert moved == (number < 3)
    assert [result.metrics.get("crepa/weight") for result in results] == [pytest.approx(0.2), pytest.approx(0.4), None]
    assert results[2].terms["crepa"] == 0
    assert results[2].metrics == {}


def test_metrics_are_averaged_over_micro_batches(bench):
    made = bench()
    two, three = made.batch(("one", "two")), made.batch(("three", "four", "five"), first_index=2)
    parts = [made.backward(batch)[1].metrics["similarity"].item() for batch in (two, three)]
    made.kernel.optimizer.zero_grad()
    found = made.step(two, three).wait().metrics["crepa/similarity"]
    assert found == pytest.approx((2 * parts[0] + 3 * parts[1]) / 5, abs=1e-6)
    assert parts[0] != pytest.approx(parts[1], abs=1e-4)


def test_training_raises_the_similarity(bench):
    made = bench(crepa_lambda=1.0, max_train_steps=40)
    batch = made.batch()
    similarities = [made.step(batch, number=number).wait().metrics["crepa/similarity"] for number in range(1, 31)]
    assert similarities[-1] > similarities[0] + 0.2


# ----------------------------------------------------------------------------------------------------- whole runs


def train(folder, plugins=(Crepa,), family=ToyFamily, **config):
    path = make_project(folder, size=(64, 32), **{"crepa_enabled": None if not plugins else True, **config})
    result = hooktuner.run(path, plugins=[family, *plugins], console=Console(file=io.StringIO()))
    lines = (result.output_dir / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


TINY = {"crepa_block_index": 1, "crepa_encoder": "tiny", "crepa_encoder_image_size": 42}


def test_weight_zero_is_bit_identical_and_the_exported_adapter_has_nothing_of_it(tmp_path):
    plain, plain_lines = train(tmp_path / "plain", ())
    zero, zero_lines = train(tmp_path / "zero", crepa_lambda=0, **TINY)
    some, some_lines = train(tmp_path / "some", crepa_lambda=0.5, **TINY)
    file = "pytorch_lora_weights.safetensors"
    assert (plain.checkpoint / file).read_bytes() == (zero.checkpoint / file).read_bytes()
    assert (plain.checkpoint / file).read_bytes() != (some.checkpoint / file).read_bytes()
    assert zero_lines == plain_lines
    assert {"loss/crepa", "crepa/similarity", "crepa/neighbours", "crepa/weight"} <= set(some_lines[0])
    keys = set(load_file(some.checkpoint / file))
    assert keys == set(load_file(plain.checkpoint / file))
    assert "regularizer.crepa.projector.1.weight" in load_file(some.checkpoint / "state/trainables.safetensors")


def test_off_in_a_step_leaves_the_denoiser_as_without(tmp_path):
    """A schedule that is 0 in these steps, although the projector is there."""
    plain, _ = train(tmp_path / "plain", ())
    later, _ = train(tmp_path / "later", crepa_lambda=0, crepa_scheduler="linear", crepa_lambda_end=1.0,
                     crepa_warmup_steps=2, **TINY)  # fmt: skip
    file = "pytorch_lora_weights.safetensors"
    assert "regularizer.crepa.projector.1.weight" in load_file(later.checkpoint / "state/trainables.safetensors")
    assert (plain.checkpoint / file).read_bytes() == (later.checkpoint / file).read_bytes()


class Counts:
    """A plugin that counts how often CREPA's encoder is loaded."""

    def __init__(self, monkeypatch):
        from hooktuner_crepa import encoder

        self.loads = 0
        load = encoder.load_encoder

        def counted(run, name):
            self.loads += 1
            return load(run, name)

        monkeypatch.setattr(encoder, "load_encoder", counted)


def test_features_are_cached_once_and_only_what_matters_encodes_again(tmp_path, monkeypatch):
    counts = Counts(monkeypatch)
    same = {**TINY, "resume_from_checkpoint": "none", "max_train_steps": 1}
    train(tmp_path, **same)
    assert counts.loads == 1
    for other in (
        {"crepa_lambda": 0.1}, {"crepa_block_index": 2}, {"crepa_encoder_frames_batch_size": 1},
        {"crepa_adjacent_distance": 2}, {"crepa_drop_vae_encoder": True}, {"crepa_cutoff_step": 1},
    ):  # fmt: skip
        train(tmp_path, **{**same, **other})
    assert counts.loads == 1
    for number, other in enumerate(({"crepa_encoder_image_size": 28}, {"crepa_frame_map": "last"}), 2):
        train(tmp_path, **{**same, **other})
        assert counts.loads == number
    files = list((tmp_path / "cache").rglob("features/**/*.safetensors"))
    assert len(files) == 6  # two clips, three recipes
    assert {tuple(load_file(file)[FEATURES].shape) for file in files} == {(3, 2, 4, 32), (3, 1, 3, 32)}


def test_a_backbone_teacher_needs_no_encoder_and_trains(tmp_path, monkeypatch):
    counts = Counts(monkeypatch)
    _, lines = train(tmp_path, crepa_feature_source="backbone", crepa_block_index=1, crepa_teacher_block_index=3)
    assert counts.loads == 0
    assert all(line["loss/crepa"] != 0 for line in lines)


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_threshold_switches_it_off_and_a_resumed_run_knows(tmp_path, mode):
    """The similarity passes the threshold at once; numbers of step 1 count from step 3 on."""
    keys = {**TINY, "crepa_similarity_threshold": -1.0, "crepa_threshold_mode": mode, "checkpoint_step_interval": 2}
    _, whole = train(tmp_path / "whole", max_train_steps=5, **keys)
    assert [line["loss/crepa"] != 0 for line in whole] == [True, True, False, False, False]
    assert ["crepa/similarity" in line for line in whole][2:] == [mode == "recoverable"] * 3
    train(tmp_path / "parts", max_train_steps=3, **keys)
    _, parts = train(tmp_path / "parts", max_train_steps=5, **keys)
    assert parts == whole
