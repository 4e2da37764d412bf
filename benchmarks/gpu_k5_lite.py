"""Kandinsky 5 Video at the real Lite dimensions on one GPU, against a plain diffusers + peft loop in the same process.

    python benchmarks/gpu_k5_lite.py [--steps 10] [--batches 1 2] [--json FILE]

2.01 B random parameters in bfloat16, LoRA r16 on attention and feed-forward of all blocks, clips of 480-pixel area and
49 frames (13 × 60 × 60 latents, 11,700 tokens), every block recomputed in the backward pass. Reports seconds per step
(median) and peak allocated memory of each side, each built anew, ours first and last.
Best published for the shape (batch 2, H100): 2.267 s/step at 9.83 GiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from hooktuner.testing import make_plugins, make_run
from sides import Shape, build_denoiser, our_side, plain_side, write_cache

LITE = Shape(
    {
        "in_text_dim": 3584, "in_text_dim2": 768, "time_dim": 512, "num_text_blocks": 2, "model_dim": 1792,
        "ff_dim": 7168, "axes_dims": (16, 24, 24), "num_visual_blocks": 32,
    },
    latents=(16, 13, 60, 60),
    text_tokens=128,
)  # fmt: skip
WARM_UP = 3


def measure(side: str, batch: int, steps: int) -> dict[str, Any]:
    """Seconds per step and peak memory of one side."""
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugins = make_plugins("kandinsky5-video")
        run = make_run(
            plugins, "tiny", folder, train_batch_size=batch, max_train_steps=10**6, caption_dropout_probability=0.0,
            checkpoint_step_interval=10**6, mixed_precision="bf16", rope_scale="sd",
        )  # fmt: skip
        run.device = device
        samples = write_cache(folder, LITE)
        denoiser = build_denoiser(LITE, device, torch.bfloat16)
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        if side == "ours":
            train = our_side(denoiser, run, plugins, samples)
        else:
            train = plain_side(denoiser, run, samples, device)
        train(WARM_UP)
        torch.cuda.reset_peak_memory_stats()
        seconds = train(steps)
        peak = torch.cuda.max_memory_allocated()
    del train, denoiser
    gc.collect()
    torch.cuda.empty_cache()
    return {
        "side": side, "batch": batch, "tokens": LITE.tokens, "parameters": parameters,
        "seconds": round(statistics.median(seconds), 4), "peak_gib": round(peak / 2**30, 2),
    }  # fmt: skip


def main() -> None:
    """Measure both sides for every batch size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_k5_lite.py — there is no CUDA device here. Run it on a machine that has one.\n")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = []
    for batch in arguments.batches:
        for side in ("ours", "plain", "ours"):
            result = measure(side, batch, arguments.steps)
            results.append(result)
            print(
                f"batch {batch} {side:>5}: {result['seconds']:.4f} s/step, peak {result['peak_gib']:.2f} GiB",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
