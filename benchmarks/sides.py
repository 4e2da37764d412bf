"""The two sides of the benchmarks: hooktuner's kernel, and the loop one would write by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
from hooktuner.context import Run
from hooktuner.data.buckets import Bucket
from hooktuner.data.loader import Loader, Sample
from hooktuner.plugins import PluginSet
from hooktuner.train.adapters import collect_trainables, prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner.train.checkpoint import Position
from hooktuner.train.engine import Engine
from hooktuner.train.kernel import Kernel
from hooktuner.train.loop import Loop, Progress
from hooktuner.train.metrics import MetricsWriter
from hooktuner.train.optim import make_optimizer
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import load_file, save_file

SHIFT = 5.0


@dataclass(frozen=True)
class Shape:
    """What is trained: the denoiser's dimensions, latents (C, F, H, W) of a clip, tokens of a caption."""

    model: dict[str, Any]
    latents: tuple[int, int, int, int]
    text_tokens: int = 24
    samples: int = 8
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Visual tokens of a clip."""
        _, frames, rows, columns = self.latents
        return frames * (rows // 2) * (columns // 2)


def build_denoiser(shape: Shape, device: torch.device, dtype: torch.dtype) -> Kandinsky5Transformer3DModel:
    """A random denoiser; modulations are not left at zero, where blocks would be identities. Modules that the model
    keeps in float32 stay so, as `from_pretrained` does it."""
    torch.manual_seed(0)
    with device:
        model = Kandinsky5Transformer3DModel(in_visual_dim=16, out_visual_dim=16, visual_cond=True, **shape.model)
    kept = tuple(model._keep_in_fp32_modules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.05)
            if not any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.to(dtype)
    return model.train()


def write_cache(folder: Path, shape: Shape) -> list[Sample]:
    """Random encoded clips and captions of equal length, in the cache's format."""
    _, frames, rows, columns = shape.latents
    bucket = Bucket(columns * 8, rows * 8, (frames - 1) * 4 + 1)
    text_dim, pooled_dim = shape.model["in_text_dim"], shape.model["in_text_dim2"]
    samples = []
    for number in range(shape.samples):
        clip, text = folder / f"clip{number}.safetensors", folder / f"text{number}.safetensors"
        save_file({"latents": torch.randn(shape.latents)}, clip)
        save_file({"qwen_LD": torch.randn(shape.text_tokens, text_dim), "clip_D": torch.randn(pooled_dim)}, text)
        samples.append(Sample(f"bench/{number}", bucket, clip, (text,)))
    return samples


def our_side(
    denoiser: Kandinsky5Transformer3DModel, run: Run, plugins: PluginSet, samples: list[Sample]
) -> Callable[[int], list[float]]:
    """A function that trains so many more steps with hooktuner and returns their seconds: loader, hooks, block runner,
    finite check, `metrics.jsonl` and all."""
    engine = Engine(run.config)
    run.device = engine.device
    prepare_trainables(run, denoiser)
    runner = BlockRunner(denoiser, run.anatomy, [], Recompute())
    runner.attach()
    trainables = collect_trainables(denoiser, {})
    kernel = Kernel(run, plugins, engine, denoiser, runner, {}, trainables, make_optimizer(run.config, trainables))
    return train_function(kernel, samples)


def train_function(kernel: Kernel, samples: list[Sample]) -> Callable[[int], list[float]]:
    """A function that trains so many more steps with a kernel and returns their seconds."""
    run, plugins, engine = kernel.run, kernel.plugins, kernel.engine
    cuda = engine.device.type == "cuda"
    loader = Loader(samples, run.config, empty_caption=samples[0].captions[0], pin_memory=cuda)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    writer = MetricsWriter(run.output_dir, engine, after_step=0)
    console = Console(quiet=True)
    position = Position()

    def train(steps: int) -> list[float]:
        nonlocal position
        progress = Progress(position)
        total = position.step + steps
        Loop(
            run, plugins, engine, kernel, loader, None, writer, console, lambda: False, {}, total, progress
        ).go()  # fmt: skip
        position = progress.position
        lines = (run.output_dir / "timings.jsonl").read_text().splitlines()
        return [json.loads(line)["seconds"] for line in lines[-steps:]]

    return train


def plain_side(
    denoiser: Kandinsky5Transformer3DModel, run: Run, samples: list[Sample], device: torch.device
) -> Callable[[int], list[float]]:
    """The same training as a loop written by hand with diffusers and peft."""
    config = run.config
    assert run.card is not None
    dtype = denoiser.dtype
    denoiser.requires_grad_(False)
    denoiser.add_adapter(
        LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=run.card.lora_targets)
    )
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    denoiser.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
    order = _forever(samples)

    def step() -> float:
        chosen = [next(order) for _ in range(config.train_batch_size)]
        x0 = torch.stack([load_file(sample.latents)["latents"] for sample in chosen]).to(device)
        texts = [load_file(sample.captions[0]) for sample in chosen]
        noise, u = torch.randn_like(x0), torch.sigmoid(torch.randn(len(chosen), device=device))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy = ((1 - s) * x0 + s * noise).permute(0, 2, 3, 4, 1).to(dtype)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
        with autocast:
            velocity = denoiser(
                hidden_states=torch.cat([noisy, torch.zeros_like(noisy), torch.zeros_like(noisy[..., :1])], dim=-1),
                encoder_hidden_states=torch.stack([text["qwen_LD"] for text in texts]).to(device, dtype),
                pooled_projections=torch.stack([text["clip_D"] for text in texts]).to(device, dtype),
                timestep=sigma * 1000,
                visual_rope_pos=[
                    torch.arange(n, device=device) for n in (noisy.shape[1], noisy.shape[2] // 2, noisy.shape[3] // 2)
                ],
                text_rope_pos=torch.arange(texts[0]["qwen_LD"].shape[0], device=device),
                scale_factor=(1, 2, 2),
                return_dict=False,
            )
        loss = torch.nn.functional.mse_loss(velocity.float().permute(0, 4, 1, 2, 3), noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def train(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        return seconds

    return train


def _forever(samples: list[Sample]) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)
    while True:
        for number in torch.randperm(len(samples), generator=generator).tolist():
            yield samples[number]
