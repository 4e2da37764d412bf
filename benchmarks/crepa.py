"""What CREPA adds to a step: our kernel with cached features against our kernel without the plugin, in one process.

    python benchmarks/crepa.py [--rounds 12] [--steps 5] [--encoder dinov2_vits14] [--image-size 224] [--json FILE]

The same denoiser, data and LoRA on both sides; the features are random, of the shape that the encoder gives for the
clip, read from safetensors like the latents. The two alternate in short rounds, so that other load on the machine hits
both; the result is the ratio of their median seconds per step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hooktuner.context import Run
from hooktuner.data.loader import Sample
from hooktuner.plugins import PluginSet
from hooktuner.testing import make_plugins, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.optim import make_optimizer
from hooktuner_crepa.encoder import STORED, encoder_size, feature_width
from hooktuner_crepa.session import FEATURES
from kernel import SHAPES
from safetensors.torch import save_file
from sides import Shape, build_denoiser, train_function, write_cache

PATCH = 14


def with_features(samples: list[Sample], folder: Path, shape: Shape, encoder: str, edge: int) -> list[Sample]:
    """The samples with random cached features of the encoder's shape."""
    _, frames, rows, columns = shape.latents
    height, width = encoder_size((rows * 8, columns * 8), edge, PATCH)
    more = []
    for number, sample in enumerate(samples):
        path = folder / f"features{number}.safetensors"
        features = torch.randn(frames, height // PATCH, width // PATCH, feature_width(encoder))
        save_file({FEATURES: features.to(STORED)}, path)
        more.append(replace(sample, features=path))
    return more


def build_kernel(run: Run, plugins: PluginSet, denoiser: torch.nn.Module) -> Kernel:
    """The kernel of a run with whatever techniques are active, on the CPU."""
    prepare_trainables(run, denoiser)
    interceptors = [interceptor for _, interceptor in plugins.intercept_blocks(run, denoiser)]
    regularizers = plugins.regularizer(run, denoiser)
    runner = BlockRunner(denoiser, run.anatomy, interceptors, Recompute())
    runner.attach()
    trainables = collect_trainables(denoiser, regularizers)
    optimizer = make_optimizer(run.config, trainables)
    return Kernel(run, plugins, Engine(run.config), denoiser, runner, regularizers, trainables, optimizer)


def measure(rounds: int, steps: int, encoder: str, edge: int) -> dict[str, float | str | int]:
    """Alternate the two sides and compare their medians; the first round warms up and is not counted."""
    shape, cpu = SHAPES["small"], torch.device("cpu")
    keys = {
        "train_batch_size": 2, "max_train_steps": 10**6, "caption_dropout_probability": 0.0,
        "checkpoint_step_interval": 10**6, "rope_scale": "sd",
    }  # fmt: skip
    crepa = {"crepa_enabled": True, "crepa_block_index": 2, "crepa_encoder": encoder, "crepa_encoder_image_size": edge}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = write_cache(folder, shape)
        sides = {}
        for side, more in (("with", crepa), ("without", {})):
            plugins = make_plugins("kandinsky5-video", *(["crepa"] if more else []))
            run = make_run(plugins, "tiny", folder / side, **keys, **more)
            mine = with_features(samples, folder, shape, encoder, edge) if more else samples
            sides[side] = train_function(build_kernel(run, plugins, build_denoiser(shape, cpu, torch.float32)), mine)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            for side in ("with", "without") if number % 2 else ("without", "with"):
                measured = sides[side](steps)
                if number:
                    seconds[side].extend(measured)
        losses = (folder / "with" / "output" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss/crepa"] != 0 for line in losses), "CREPA was not at work"
    median = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "encoder": encoder,
        "image_size": edge,
        "threads": torch.get_num_threads(),
        "steps_each": rounds * steps,
        "with_s": round(median["with"], 5),
        "without_s": round(median["without"], 5),
        "ratio": round(median["with"] / median["without"], 4),
    }


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--encoder", default="dinov2_vits14")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.steps, arguments.encoder, arguments.image_size)
    print(
        f"{result['encoder']} at {result['image_size']}: with {result['with_s']:.4f} s/step, without "
        f"{result['without_s']:.4f} s/step, ratio {result['ratio']:.3f} ({result['steps_each']} steps each, "
        f"{result['threads']} threads)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
