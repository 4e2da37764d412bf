"""TREAD: counted FLOPs of a denoiser beside the formula, and measured time beside the bound that FLOPs set.

    python benchmarks/tread_flops.py [--ratio 0.5] [--start 2] [--end -2] [--rounds 10] [--json FILE]

Counted: torch's `FlopCounterMode` over the visual blocks of a small Kandinsky 5 denoiser, forward, and forward with
backward of a full fine-tune, routed and not. Formula, with S tokens of width D, feed-forward width F, L_t text tokens:

    f(S) = S·(8D² + 4DF) + 4S²D  +  4SD² + 4S·L_t·D + 4L_t·D²  +  modulation     (self, feed-forward, cross, per sample)
    R    = [(L − n)·f(S) + n·f(K)] / (L·f(S))                                    n routed blocks, K kept tokens

Both must agree to four digits; the script fails where they do not. Measured: training steps (forward, recomputation of
every block, backward; a LoRA of rank 16) with and without the plugin, alternating in short rounds. Seconds are the
processor's, so that other load on the machine does not count; set OMP_NUM_THREADS=1, because idle threads spin.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hooktuner.context import Run
from hooktuner.plugins import PluginSet
from hooktuner.step import Batch, Step
from hooktuner.testing import make_plugins, make_run, make_step
from hooktuner.train.adapters import prepare_trainables
from hooktuner.train.blocks import BlockRunner, Recompute
from hooktuner_tread.options import TreadConfig
from hooktuner_tread.routes import Span, resolve
from sides import Shape, build_denoiser
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TEXT = {"in_text_dim": 32, "in_text_dim2": 32, "time_dim": 64, "num_text_blocks": 1}
COUNTED = Shape(
    {**TEXT, "model_dim": 64, "ff_dim": 256, "axes_dims": (8, 12, 12), "num_visual_blocks": 8}, (16, 3, 16, 24)
)
TIMED = Shape(
    {**TEXT, "model_dim": 256, "ff_dim": 1024, "axes_dims": (16, 24, 24), "num_visual_blocks": 8}, (16, 3, 32, 32)
)


@dataclass
class Bench:
    """A denoiser with a step of one sample."""

    shape: Shape
    run: Run
    plugins: PluginSet
    denoiser: nn.Module
    step: Step
    span: Span

    def train_step(self, *, routed: bool, backward: bool = True, recompute: bool = False) -> None:
        """Forward, and backward unless told otherwise."""
        routes = [one for _, one in self.plugins.intercept_blocks(self.run, self.denoiser)] if routed else []
        runner = BlockRunner(self.denoiser, self.run.anatomy, routes, Recompute(enabled=recompute))
        runner.attach()
        with runner.during(self.step):
            velocity = self.plugins.predict(self.run, self.denoiser, self.step)
            if backward:
                (velocity - self.step.target_BCFHW).square().mean().backward()
        runner.detach()
        self.denoiser.zero_grad(set_to_none=True)


def make_bench(shape: Shape, folder: Path, model_type: str, config: dict[str, Any]) -> Bench:
    """A bench with one route."""
    plugins = make_plugins("kandinsky5-video", "tread")
    run = make_run(
        plugins, "tiny", folder, rope_scale="sd", model_type=model_type, tread_config=config, tread_disable_after=1.0
    )
    denoiser = build_denoiser(shape, torch.device("cpu"), torch.float32)
    if model_type == "lora":
        prepare_trainables(run, denoiser)
    torch.manual_seed(0)
    _, frames, rows, columns = shape.latents
    batch = Batch(
        keys=["bench"],
        index=[0],
        latents_BCFHW=torch.randn(1, *shape.latents),
        noise_BCFHW=torch.randn(1, *shape.latents),
        sigma_B=torch.tensor([0.5]),
        text=[
            {
                "qwen_LD": torch.randn(shape.text_tokens, shape.model["in_text_dim"]),
                "clip_D": torch.randn(shape.model["in_text_dim2"]),
            }
        ],
        pixels=((frames - 1) * 4 + 1, rows * 8, columns * 8),
    )
    (span,) = resolve(TreadConfig.model_validate(config), shape.model["num_visual_blocks"], "the benchmark's model")
    return Bench(shape, run, plugins, denoiser, make_step(run, plugins, batch), span)


def block_flops(shape: Shape, tokens: int) -> int:
    """f(S) of the formula for one sample, multiply and add counted apart."""
    width, hidden, text = shape.model["model_dim"], shape.model["ff_dim"], shape.text_tokens
    own = tokens * (8 * width**2 + 4 * width * hidden) + 4 * tokens**2 * width
    cross = 4 * tokens * width**2 + 4 * tokens * text * width + 4 * text * width**2
    return own + cross + 2 * shape.model["time_dim"] * 9 * width


def expected_share(shape: Shape, span: Span) -> float:
    """R of the formula."""
    tokens, blocks = shape.tokens, shape.model["num_visual_blocks"]
    kept = tokens - int(span.ratio * tokens)
    routed = span.end - span.start + 1
    whole = block_flops(shape, tokens)
    return ((blocks - routed) * whole + routed * block_flops(shape, kept)) / (blocks * whole)


def counted(bench: Bench, *, routed: bool, backward: bool) -> int:
    """FLOPs of the whole denoiser. Attention as matrix products, whose backward pass costs twice the forward."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        bench.train_step(routed=routed, backward=backward)
    return counter.get_total_flops()


def counted_share(bench: Bench, one_block: Bench, *, backward: bool) -> tuple[float, float]:
    """(share of the blocks' FLOPs that routing leaves, FLOPs of one dense block), counted.

    What is outside the blocks is told apart by a second denoiser with a single block.
    """
    blocks = bench.shape.model["num_visual_blocks"]
    dense = counted(bench, routed=False, backward=backward)
    single = counted(one_block, routed=False, backward=backward)
    block = (dense - single) / (blocks - 1)
    rest = single - block
    return (counted(bench, routed=True, backward=backward) - rest) / (dense - rest), block


def count(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Counted shares beside the formula's."""
    bench = make_bench(COUNTED, folder, "full", config)
    lone = replace(COUNTED, model={**COUNTED.model, "num_visual_blocks": 1})
    one_block = replace(bench, shape=lone, denoiser=build_denoiser(lone, torch.device("cpu"), torch.float32))
    forward, block = counted_share(bench, one_block, backward=False)
    both, block_both = counted_share(bench, one_block, backward=True)
    formula = block_flops(COUNTED, COUNTED.tokens)
    return {
        "tokens": COUNTED.tokens,
        "blocks": COUNTED.model["num_visual_blocks"],
        "routed_blocks": [bench.span.start, bench.span.end],
        "formula": round(expected_share(COUNTED, bench.span), 6),
        "forward": round(forward, 6),
        "forward_backward": round(both, 6),
        "block_forward": round(block / formula, 6),
        "block_forward_backward": round(block_both / formula / 3, 6),
    }


def measure(folder: Path, config: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Processor seconds per step with and without routes; the first round warms up."""
    bench = make_bench(TIMED, folder, "lora", config)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for routed in (True, False) if number % 2 else (False, True):
            for _ in range(steps):
                begin = time.process_time()
                bench.train_step(routed=routed, recompute=True)
                if number:
                    seconds[routed].append(time.process_time() - begin)
    routed_s, plain_s = (statistics.median(seconds[key]) for key in (True, False))
    return {
        "tokens": TIMED.tokens,
        "blocks": TIMED.model["num_visual_blocks"],
        "width": TIMED.model["model_dim"],
        "threads": torch.get_num_threads(),
        "steps_each": rounds * steps,
        "routed_s": round(routed_s, 4),
        "plain_s": round(plain_s, 4),
        "speed_up": round(plain_s / routed_s, 3),
        "bound": round(1 / expected_share(TIMED, bench.span), 3),
    }


def main() -> None:
    """Count, measure, print; exit 1 where the count and the formula differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--start", type=int, default=2)
    parser.add_argument("--end", type=int, default=-2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    route = {"selection_ratio": arguments.ratio, "start_layer_idx": arguments.start, "end_layer_idx": arguments.end}
    config = {"routes": [route]}
    with tempfile.TemporaryDirectory() as name:
        flops = count(Path(name), config)
        print(
            f"FLOPs of the blocks, routed / dense: formula {flops['formula']:.4f}, counted {flops['forward']:.4f} "
            f"(forward), {flops['forward_backward']:.4f} (forward and backward)"
        )
        seconds = measure(Path(name), config, arguments.rounds, arguments.steps) if arguments.rounds else None
    if seconds:
        print(
            f"processor seconds per LoRA step at {seconds['tokens']} tokens: {seconds['routed_s']:.3f} routed, "
            f"{seconds['plain_s']:.3f} plain: x{seconds['speed_up']:.2f}, bound x{seconds['bound']:.2f} "
            f"({seconds['steps_each']} steps each, {seconds['threads']} threads)"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"route": route, "flops": flops, "time": seconds}, indent=2) + os.linesep)
    shares = all(abs(flops[key] - flops["formula"]) < 5e-5 for key in ("forward", "forward_backward"))
    if not shares or flops["block_forward"] != 1 or flops["block_forward_backward"] != 1:
        sys.exit("the count and the formula differ")


if __name__ == "__main__":
    main()
