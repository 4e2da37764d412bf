"""CREPA on the real families: the tiny checkpoints, through the families' own anatomies."""

from __future__ import annotations

import io
import json
import math

import hooktuner
import numpy as np
import pytest
import torch
from hooktuner.testing import load_denoiser, make_batch, make_plugins, make_project, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.optim import make_optimizer
from rich.console import Console
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings(  # torch, of the bfloat16 norms of the model
    "ignore:Mismatch dtype between input and weight:UserWarning"
)

FAMILIES = [("kandinsky5-video", "tiny"), ("kandinsky5-video", "tiny-i2v")]
TINY = {"crepa_enabled": True, "crepa_block_index": 1, "crepa_encoder": "tiny", "crepa_encoder_image_size": 42}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOKTUNER_HOME", str(tmp_path / "home"))


class Tap(hooktuner.BlockInterceptor):
    """Keeps the outputs of block 1 in raster order, by the rows of the batch."""

    def __init__(self):
        self.tokens = {}

    def call(self, call, proceed):
        output = proceed(call)
        if call.index == 1:
            whole = call.anatomy.to_grid(output, call.args)
            for row, tokens in zip(call.step.rows, whole, strict=True):
                self.tokens[row] = tokens.detach()
        return output


@pytest.mark.parametrize(("family", "flavour"), FAMILIES)
def test_the_term_equals_a_sum_by_loops_whatever_the_captions(tmp_path, family, flavour):
    plugins = make_plugins(family, "crepa")
    run = make_run(plugins, flavour, tmp_path, lora_rank=4, max_train_steps=2, **TINY)
    denoiser = load_denoiser(run, plugins)
    prepare_trainables(run, denoiser)
    regularizers = plugins.regularizer(run, denoiser)
    tap = Tap()
    mine = [one for _, one in plugins.intercept_blocks(run, denoiser)]
    runner = BlockRunner(denoiser, run.anatomy, [*mine, tap], Recompute())
    runner.attach()
    trainables = collect_trainables(denoiser, regularizers)
    optimizer = make_optimizer(run.config, trainables)
    kernel = Kernel(run, plugins, Engine(run.config), denoiser, runner, regularizers, trainables, optimizer)
    captions = ("a dog", "a long tale of two cats and a bridge", "a cat")
    batch = make_batch(run, plugins, captions=captions, pixels=(9, 64, 96))
    step = kernel.draw(batch, 1, 0)
    with runner.during(step):
        step.prediction_BCFHW = kernel.predict(step)
        term = kernel.losses(step)["crepa"]

    frames, rows, columns = (3, 4, 6)
    project = regularizers["crepa"].modules()["projector"].double()
    features = batch.features["crepa/patches"].double()
    assert features.shape[:2] == (3, frames)
    values = []
    for b in range(3):
        with torch.no_grad():
            student = unit(project(tap.tokens[b].double()).numpy())
        small = torch.nn.functional.interpolate(
            features[b].permute(0, 3, 1, 2), (rows, columns), mode="bilinear", antialias=True
        )
        teacher = unit(small.permute(0, 2, 3, 1).reshape(frames, rows * columns, -1).numpy())
        for f in range(1 if flavour == "tiny-i2v" else 0, frames):
            near = [(f, 1.0), (f - 1, math.exp(-1)), (f + 1, math.exp(-1))]
            sims = [weight * (student[f] * teacher[k]).sum(-1).mean() for k, weight in near if 0 <= k < frames]
            values.append(sum(sims))
    assert term.item() == pytest.approx(-0.5 * np.mean(values), abs=1e-5)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(("family", "flavour"), FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_trains_resumes_and_exports_nothing_of_it(tmp_path, family, flavour, kind):
    def train(folder, steps):
        path = make_project(
            tmp_path / folder, family=family, flavour=flavour, size=(96, 64), model_type=kind, max_train_steps=steps,
            mixed_precision="bf16", checkpoint_step_interval=1, **TINY,
        )  # fmt: skip
        result = hooktuner.run(path, plugins=[family, "crepa"], console=Console(file=io.StringIO()))
        return result.checkpoint, (result.output_dir / "metrics.jsonl").read_text()

    whole, whole_lines = train("whole", 2)
    train("parts", 1)
    parts, parts_lines = train("parts", 2)
    assert parts_lines == whole_lines
    lines = [json.loads(line) for line in whole_lines.splitlines()]
    assert all(math.isfinite(line["crepa/similarity"]) and line["loss/crepa"] != 0 for line in lines)
    for file in whole.rglob("*.safetensors"):
        assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes(), file.name
    exported = [file for file in whole.rglob("*.safetensors") if "state" not in file.parts]
    assert exported
    for file in exported:
        assert not [key for key in load_file(file) if "crepa" in key or "projector" in key]


def test_a_block_that_the_model_lacks_is_named_with_the_number_of_blocks(tmp_path):
    plugins = make_plugins("kandinsky5-video", "crepa")
    run = make_run(plugins, "tiny", tmp_path, **{**TINY, "crepa_block_index": 8})
    with pytest.raises(
        hooktuner.ModelError, match=r"crepa_block_index — there is no block 8: kandinsky5-video tiny has"
    ):
        plugins.intercept_blocks(run, load_denoiser(run, plugins))


def test_places_of_tiled_tokens_are_undone():
    """Kandinsky's block-sparse order: tiles of 8 x 8 tokens that follow each other."""
    from hooktuner import Grid
    from hooktuner_crepa.capture import raster_places
    from hooktuner_kandinsky5_video.anatomy import Kandinsky5Anatomy

    frames, rows, columns = 2, 16, 24
    sparse = {"visual_shape": (frames, rows, columns)}
    args = (torch.zeros(1, frames * rows * columns, 4), None, None, torch.zeros(1), sparse)
    places = raster_places(Kandinsky5Anatomy(), args, Grid(frames, rows, columns))
    wanted = np.arange(frames * rows * columns).reshape(frames, rows // 8, 8, columns // 8, 8)
    assert places.tolist() == wanted.transpose(0, 1, 3, 2, 4).reshape(-1).tolist()
