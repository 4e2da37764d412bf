"""Group offload at the real Kandinsky 5 Lite (2.01 B) and Pro (19 B) dimensions on one GPU, against resident weights.

    python benchmarks/gpu_offload.py [--model lite pro] [--steps 10] [--batch 2] [--depths 2 3] [--json FILE]

Random bfloat16 weights, LoRA r16, clips of 480-pixel area and 49 frames (11,700 tokens), every block recomputed. For
each model: all weights resident, then every block streamed, for each ring depth. Reports seconds per step (median),
peak allocated memory, bytes and stall per step, and the overhead over resident in the same process. Pro is resident
where it fits (38 GB of weights); `--streamed-only` leaves that out.
Best known elsewhere: about 5 % overhead with 47 of 48 blocks streamed; 8.40 GiB for the Lite shape at batch 2 (int8).
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
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
from gpu_k5_lite import LITE
from hooktuner.testing import make_plugins, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.optim import make_optimizer
from sides import Shape, build_denoiser, train_function, write_cache

PRO = Shape(
    {
        "in_text_dim": 3584, "in_text_dim2": 768, "time_dim": 1024, "num_text_blocks": 4, "model_dim": 4096,
        "ff_dim": 16384, "axes_dims": (32, 48, 48), "num_visual_blocks": 60,
    },
    latents=(16, 13, 60, 60),
    text_tokens=128,
)  # fmt: skip
SHAPES = {"lite": LITE, "pro": PRO}
WARM_UP = 4
"""Steps: memory is measured in the first ones where the number of resident blocks is left open."""


def build_on_host(shape: Shape) -> Kandinsky5Transformer3DModel:
    """The random denoiser in main memory. Its numbers are made on the GPU, in bfloat16, because float32 would not fit
    there and a CPU takes minutes for 19 billion of them; what the model keeps in float32 is float32 then."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build_denoiser(shape, torch.device("cuda"), torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = tuple(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
    for buffer in model.buffers():
        buffer.data = buffer.data.float()  # rotary frequencies
    model.to("cpu")
    torch.cuda.empty_cache()
    return model


def measure(name: str, batch: int, steps: int, offload: dict[str, Any] | None) -> dict[str, Any]:
    """One side: seconds per step, peak memory, and what the strategy reports."""
    shape, device = SHAPES[name], torch.device("cuda")
    names = ["kandinsky5-video", *(["group-offload"] if offload is not None else [])]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plugins = make_plugins(*names)
        switch = {"enable_group_offload": True, **offload} if offload is not None else {}
        run = make_run(
            plugins, "tiny", folder, train_batch_size=batch, max_train_steps=10**6, caption_dropout_probability=0.0,
            checkpoint_step_interval=10**6, mixed_precision="bf16", rope_scale="sd", **switch,
        )  # fmt: skip
        engine = Engine(run.config)
        run.device = engine.device
        samples = write_cache(folder, shape)
        denoiser = build_on_host(shape)
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        prepare_trainables(run, denoiser)
        strategy = plugins.offload_strategy(run, denoiser)
        if strategy is None:
            denoiser.to(device)
        else:
            strategy.place()
        interceptors = [one for _, one in plugins.intercept_blocks(run, denoiser)]
        runner = BlockRunner(denoiser, run.anatomy, interceptors, Recompute())
        runner.attach()
        trainables = collect_trainables(denoiser, {})
        optimizer = make_optimizer(run.config, trainables)
        kernel = Kernel(run, plugins, engine, denoiser, runner, {}, trainables, optimizer, strategy)
        train = train_function(kernel, samples)
        try:
            train(WARM_UP)
            torch.cuda.reset_peak_memory_stats()
            seconds = train(steps)
            peak = torch.cuda.max_memory_allocated()
            lines = [json.loads(line) for line in (run.output_dir / "timings.jsonl").read_text().splitlines()[-steps:]]
        finally:
            if strategy is not None:
                strategy.close()
    result = {
        "model": name, "batch": batch, "tokens": shape.tokens, "parameters": parameters, "offload": offload,
        "seconds": round(statistics.median(seconds), 4), "peak_gib": round(peak / 2**30, 2),
    }  # fmt: skip
    for key in ("bytes_h2d", "stall_seconds", "hidden_fraction"):
        if key in lines[0]:
            result[key] = statistics.median(line[key] for line in lines)
    del train, kernel, optimizer, trainables, runner, interceptors, strategy, denoiser
    gc.collect()
    torch.cuda.empty_cache()
    return result


def describe(result: dict[str, Any], resident: dict[str, Any] | None) -> str:
    """One line of the table."""
    what = "resident" if result["offload"] is None else ", ".join(f"{k}={v}" for k, v in result["offload"].items())
    line = f"{result['model']} batch {result['batch']} {what}: {result['seconds']:.4f} s/step, {result['peak_gib']} GiB"
    if resident is not None and result is not resident:
        line += f", {result['seconds'] / resident['seconds'] - 1:+.1%} over resident"
    if "bytes_h2d" in result:
        line += (
            f", {result['bytes_h2d'] / 2**30:.2f} GiB copied, {1000 * result['stall_seconds']:.1f} ms stalled, "
            f"{result['hidden_fraction']:.1%} hidden"
        )
    return line


def main() -> None:
    """Measure every side and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=["lite"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--streamed-only", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_offload.py — there is no CUDA device here. Run it on a machine that has one.\n")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    results = []
    for name in arguments.model:
        resident = None
        sides: list[dict[str, Any] | None] = [] if arguments.streamed_only else [None]
        for depth in arguments.depths:
            sides.append({"group_offload_resident_blocks": 0, "group_offload_ring_depth": depth})
        sides.append({"group_offload_resident_blocks": 0, "group_offload_use_stream": False})
        for offload in sides:
            result = measure(name, arguments.batch, arguments.steps, offload)
            resident = result if offload is None else resident
            results.append(result)
            print(describe(result, resident), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
