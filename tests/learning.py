"""Does the whole chain learn, and does what it learned come out of the official sampler?

Two clips with two captions are cached by the real encoders of a tiny checkpoint, a small denoiser is trained on them by
`hooktuner.run`, and the family's own diffusers pipeline, fed each caption, samples latents. They must be clearly
nearer to the caption's own clip than to the other one. A wrong sign, shift, scale or embedding anywhere breaks that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import hooktuner
import numpy as np
import torch
from hooktuner.testing import write_video
from hooktuner_kandinsky5_video import tiny
from rich.console import Console

CAPTIONS = ("a red field beside a deep blue one", "a green meadow under the bright yellow sun")
COLOURS = (((230, 30, 30), (20, 20, 190)), ((20, 190, 40), (240, 230, 40)))
FRAMES, SIDE = 5, 64


@dataclass(frozen=True)
class Errors:
    """Mean squared distance of what was sampled for a caption to its own clip and to the other, per caption."""

    own: tuple[float, ...]
    other: tuple[float, ...]

    @property
    def separation(self) -> float:
        """How many times the other clip is further away than the own one, for the worse caption."""
        return min(other / own for own, other in zip(self.own, self.other, strict=True))


def build_checkpoint(folder: Path) -> Path:
    """A tiny checkpoint with a wider denoiser, whose VAE's scaling gives latents about the size of noise."""
    tiny.build(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tiny.denoiser(model_dim=64, ff_dim=256, time_dim=64).save_pretrained(folder / "transformer")
    config = folder / "vae/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "scaling_factor": 4.0}))
    return folder


def write_clips(folder: Path) -> None:
    """Two clips of two coloured halves each, with their captions beside them."""
    folder.mkdir()
    for number, ((left, right), caption) in enumerate(zip(COLOURS, CAPTIONS, strict=True)):
        ramp_W1 = np.linspace(-1.5, 2.5, SIDE).clip(0, 1)[:, None]  # soft: decoders differ at sharp colour edges
        row_WC = (1 - ramp_W1) * np.array(left) + ramp_W1 * np.array(right)
        frames = np.broadcast_to(row_WC.round().astype(np.uint8), (FRAMES, SIDE, SIDE, 3)).copy()
        write_video(folder / f"clip{number}.mp4", frames, rate=24)
        (folder / f"clip{number}.txt").write_text(caption)


def config_of(folder: Path, model: Path, **config: Any) -> dict[str, Any]:
    """The config of a run on the two clips; writes clips and datasets file where they are not there yet."""
    if not (folder / "clips").exists():
        folder.mkdir(exist_ok=True)
        write_clips(folder / "clips")
    datasets = [
        {
            "id": "clips", "type": "local", "dataset_type": "video", "instance_data_dir": str(folder / "clips"),
            "caption_strategy": "textfile", "resolution": SIDE, "repeats": 3, "video": {"num_frames": FRAMES},
        }
    ]  # fmt: skip
    (folder / "datasets.json").write_text(json.dumps(datasets))
    return {
        "model_family": "kandinsky5-video", "model_flavour": "tiny", "pretrained_model_name_or_path": str(model),
        "mixed_precision": "no", "output_dir": str(folder / "output"), "cache_dir": str(folder / "cache"),
        "train_batch_size": 8, "data_backend_config": str(folder / "datasets.json"), "gradient_checkpointing": False,
        "caption_dropout_probability": 0.0, "validation_disable": True, "lr_scheduler": "cosine",
        "lr_warmup_steps": 20, "checkpoint_step_interval": 100_000, "resume_from_checkpoint": "none", **config,
    }  # fmt: skip


def train(config: dict[str, Any], plugins: Sequence[Any] = ()) -> Path:
    """Train; returns the last checkpoint."""
    result = hooktuner.run(config, plugins=list(plugins), console=Console(quiet=True))
    assert result.checkpoint is not None
    return result.checkpoint


def clip_latents(folder: Path, model: Path) -> list[torch.Tensor]:
    """What the two clips are as latents (C, F, H, W), in the order of `CAPTIONS`: by PyAV and diffusers alone, so that
    a mistake in our decoding, encoding or scaling is not in the reference too."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo.from_pretrained(model, subfolder="vae")
    found = []
    for number in range(len(CAPTIONS)):
        with av.open(str(folder / f"clips/clip{number}.mp4")) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2).float()[None] / 127.5 - 1
        with torch.no_grad():
            found.append(vae.encode(pixels).latent_dist.mode()[0] * vae.config["scaling_factor"])
    return found


def sample(model: Path, checkpoint: Path | None, captions: Sequence[str], *, steps: int = 20) -> list[torch.Tensor]:
    """Latents (C, F, H, W) from the diffusers pipeline: the model's own weights, a full `transformer/`, or a LoRA."""
    from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
    from hooktuner_kandinsky5_video.processor import TextProcessor

    full = checkpoint is not None and (checkpoint / "transformer").exists()
    source = checkpoint if full else model
    denoiser = Kandinsky5Transformer3DModel.from_pretrained(source, subfolder="transformer")
    processor = TextProcessor.from_pretrained(model, subfolder="tokenizer")
    pipeline = Kandinsky5T2VPipeline.from_pretrained(model, transformer=denoiser, tokenizer=processor)
    pipeline.set_progress_bar_config(disable=True)
    if checkpoint is not None and not full:
        pipeline.load_lora_weights(checkpoint)
        assert pipeline.get_active_adapters()
    outputs = []
    for caption in captions:
        frames = pipeline(
            prompt=caption, height=SIDE, width=SIDE, num_frames=FRAMES, num_inference_steps=steps, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(3), output_type="latent",
        ).frames  # fmt: skip
        outputs.append(frames[0].permute(3, 0, 1, 2))
    return outputs


def errors(sampled: Sequence[torch.Tensor], clips: Sequence[torch.Tensor]) -> Errors:
    """Distances of what was sampled for each caption to its own clip and to the other."""
    own = tuple((one - clip).square().mean().item() for one, clip in zip(sampled, clips, strict=True))
    other = tuple((one - clip).square().mean().item() for one, clip in zip(sampled, reversed(clips), strict=True))
    return Errors(own, other)
