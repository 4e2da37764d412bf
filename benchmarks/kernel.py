"""The kernel against a plain diffusers + peft loop, on the same denoiser, data and sizes, in one process.

    python benchmarks/kernel.py [--size tiny|small|all] [--rounds 12] [--steps 5] [--json FILE]

Both sides train a LoRA with gradient checkpointing on cached latents and captions read from safetensors, draw noise
and σ, clip, and step AdamW. The two alternate in short rounds, so that other load on the machine hits both; the result
is the ratio of their median seconds per step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from hooktuner.testing import make_plugins, make_run
from sides import Shape, build_denoiser, our_side, plain_side, write_cache

TEXT = {"in_text_dim": 32, "in_text_dim2": 32, "time_dim": 64, "num_text_blocks": 2}
SHAPES = {
    "tiny": Shape(
        {**TEXT, "model_dim": 32, "ff_dim": 64, "axes_dims": (4, 6, 6), "num_visual_blocks": 4}, (16, 3, 8, 8)
    ),
    "small": Shape(
        {**TEXT, "model_dim": 256, "ff_dim": 1024, "axes_dims": (16, 24, 24), "num_visual_blocks": 8}, (16, 5, 24, 24)
    ),
}


def measure(size: str, rounds: int, steps: int) -> dict[str, float | str | int]:
    """Alternate the two sides and compare their medians; the first round warms up and is not counted."""
    shape, cpu = SHAPES[size], torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugins = make_plugins("kandinsky5-video")
        run = make_run(
            plugins, "tiny", folder, train_batch_size=2, max_train_steps=10**6, caption_dropout_probability=0.0,
            checkpoint_step_interval=10**6, rope_scale="sd",
        )  # fmt: skip
        samples = write_cache(folder, shape)
        sides = {
            "ours": our_side(build_denoiser(shape, cpu, torch.float32), run, plugins, samples),
            "plain": plain_side(build_denoiser(shape, cpu, torch.float32), run, samples, cpu),
        }
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for number in range(rounds + 1):
            for side in ("ours", "plain") if number % 2 else ("plain", "ours"):
                measured = sides[side](steps)
                if number:
                    seconds[side].extend(measured)
    median = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "size": size,
        "threads": torch.get_num_threads(),
        "steps_each": rounds * steps,
        "ours_s": round(median["ours"], 5),
        "plain_s": round(median["plain"], 5),
        "ratio": round(median["ours"] / median["plain"], 4),
    }


def main() -> None:
    """Measure and print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sizes = list(SHAPES) if arguments.size == "all" else [arguments.size]
    results = [measure(size, arguments.rounds, arguments.steps) for size in sizes]
    for result in results:
        print(
            f"{result['size']:>6}: ours {result['ours_s']:.4f} s/step, plain {result['plain_s']:.4f} s/step, "
            f"ratio {result['ratio']:.3f} ({result['steps_each']} steps each, {result['threads']} threads)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
