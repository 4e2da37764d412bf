"""The kernel against a plain diffusers + peft loop, on the same denoiser, data and sizes, in one process.

    python benchmarks/kernel.py [--size tiny|small] [--rounds 12] [--steps 5] [--json FILE]

Both sides train a LoRA with gradient checkpointing on cached latents and captions read from safetensors, draw noise
and σ, clip, and step AdamW. Ours does it through the loader, the hooks, the block runner, the finite check and
`metrics.jsonl`; the other side is the loop that one would write by hand. The two alternate in short rounds, so that
other load on the machine hits both; the result is the ratio of their median seconds per step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file, save_file

from hooktuner.context import Run
from hooktuner.data.buckets import Bucket
from hooktuner.data.loader import Loader, Sample
from hooktuner.plugins import PluginSet
from hooktuner.testing import make_plugins, make_run
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.checkpoint import Position
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.loop import Loop, Progress
from hooktuner.train.metrics import MetricsWriter
from hooktuner.train.optim import make_optimizer

SIZES = {
    "tiny": {"model_dim": 32, "ff_dim": 64, "axes_dims": (4, 6, 6), "num_visual_blocks": 4, "latents": (16, 3, 8, 8)},
    "small": {
        "model_dim": 256, "ff_dim": 1024, "axes_dims": (16, 24, 24), "num_visual_blocks": 8, "latents": (16, 5, 24, 24),
    },
}  # fmt: skip
"""Width, blocks and latents (C, F, H, W) of a clip."""
BATCH, SAMPLES, TEXT_TOKENS = 2, 8, 24


def build_denoiser(model_dim: int, ff_dim: int, axes_dims: tuple[int, ...], num_visual_blocks: int, **_: object):
    """A random denoiser of the family; modulations are not left at zero, where blocks would be identities."""
    torch.manual_seed(0)
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=32, in_text_dim2=32, time_dim=64, visual_cond=True,
        num_text_blocks=2, model_dim=model_dim, ff_dim=ff_dim, axes_dims=axes_dims, num_visual_blocks=num_visual_blocks,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.05)
    return model


def write_cache(folder: Path, latents: tuple[int, int, int, int]) -> list[Sample]:
    """Random encoded clips and captions of equal length, in the cache's format."""
    _, frames, rows, columns = latents
    bucket = Bucket(columns * 8, rows * 8, (frames - 1) * 4 + 1)
    samples = []
    for number in range(SAMPLES):
        clip, text = folder / f"clip{number}.safetensors", folder / f"text{number}.safetensors"
        save_file({"latents": torch.randn(latents)}, clip)
        save_file({"qwen_LD": torch.randn(TEXT_TOKENS, 32), "clip_D": torch.randn(32)}, text)
        samples.append(Sample(f"bench/{number}", bucket, clip, (text,)))
    return samples


# ----------------------------------------------------------------------------------------------------- two sides


def our_side(size: str, run: Run, plugins: PluginSet, samples: list[Sample], steps: int) -> Callable[[], list[float]]:
    """A function that trains `steps` more steps with hooktuner and returns their seconds."""
    engine = Engine(run.config)
    denoiser = build_denoiser(**SIZES[size]).train()
    prepare_trainables(run, denoiser)
    runner = BlockRunner(denoiser, run.anatomy, [], Recompute())
    runner.attach()
    trainables = collect_trainables(denoiser, {})
    kernel = Kernel(run, plugins, engine, denoiser, runner, {}, trainables, make_optimizer(run.config, trainables))
    loader = Loader(samples, run.config, empty_caption=samples[0].captions[0])
    writer = MetricsWriter(run.output_dir, engine, after_step=0)
    position = Position()
    console = Console(quiet=True)

    def train() -> list[float]:
        nonlocal position
        total = position.step + steps
        progress = Progress(position)
        loop = Loop(
            run, plugins, engine, kernel, loader, None, writer, console, lambda: False, {}, total, progress
        )  # fmt: skip
        loop.go()
        position = progress.position
        writer.flush()
        lines = (run.output_dir / "timings.jsonl").read_text().splitlines()
        return [json.loads(line)["seconds"] for line in lines[-steps:]]

    return train


def plain_side(size: str, run: Run, samples: list[Sample], steps: int) -> Callable[[], list[float]]:
    """The same training as a loop written by hand."""
    config = run.config
    denoiser = build_denoiser(**SIZES[size]).train()
    denoiser.requires_grad_(False)
    assert run.card is not None
    denoiser.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=run.card.lora_targets))
    denoiser.enable_gradient_checkpointing()
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    order = iter_samples(samples)

    def step() -> float:
        chosen = [next(order) for _ in range(BATCH)]
        x0 = torch.stack([load_file(sample.latents)["latents"] for sample in chosen])
        texts = [load_file(sample.captions[0]) for sample in chosen]
        noise, u = torch.randn_like(x0), torch.sigmoid(torch.randn(BATCH))
        sigma = 5 * u / (1 + 4 * u)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy = ((1 - s) * x0 + s * noise).permute(0, 2, 3, 4, 1)
        velocity = denoiser(
            hidden_states=torch.cat([noisy, torch.zeros_like(noisy), torch.zeros_like(noisy[..., :1])], dim=-1),
            encoder_hidden_states=torch.stack([text["qwen_LD"] for text in texts]),
            pooled_projections=torch.stack([text["clip_D"] for text in texts]),
            timestep=sigma * 1000,
            visual_rope_pos=[torch.arange(n) for n in (noisy.shape[1], noisy.shape[2] // 2, noisy.shape[3] // 2)],
            text_rope_pos=torch.arange(TEXT_TOKENS),
            scale_factor=(1, 2, 2),
            return_dict=False,
        )
        loss = torch.nn.functional.mse_loss(velocity.permute(0, 4, 1, 2, 3), noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def train() -> list[float]:
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    return train


def iter_samples(samples: list[Sample]) -> Iterator[Sample]:
    """Epoch after epoch, shuffled."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for number in torch.randperm(len(samples), generator=generator).tolist():
            yield samples[number]


# -------------------------------------------------------------------------------------------------------- result


def measure(size: str, rounds: int, steps: int) -> dict[str, float | str | int]:
    """Alternate the two sides and compare their medians; the first round warms up and is not counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plugins = make_plugins("kandinsky5-video")
        run = make_run(
            plugins, "tiny", folder, train_batch_size=BATCH, max_train_steps=10**6, lora_rank=16,
            caption_dropout_probability=0.0, checkpoint_step_interval=10**6,
        )  # fmt: skip
        run.output_dir.mkdir(parents=True, exist_ok=True)
        samples = write_cache(folder, SIZES[size]["latents"])  # type: ignore[arg-type]
        ours, plain = our_side(size, run, plugins, samples, steps), plain_side(size, run, samples, steps)
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for number in range(rounds + 1):
            sides = [("ours", ours), ("plain", plain)]
            for side, train in sides if number % 2 else sides[::-1]:
                measured = train()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = [
        measure(size, arguments.rounds, arguments.steps)
        for size in (SIZES if arguments.size == "all" else [arguments.size])
    ]
    for result in results:
        print(
            f"{result['size']:>6}: ours {result['ours_s']:.4f} s/step, plain {result['plain_s']:.4f} s/step, "
            f"ratio {result['ratio']:.3f} ({result['steps_each']} steps each, {result['threads']} threads)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
