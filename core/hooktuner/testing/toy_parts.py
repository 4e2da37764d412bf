"""What surrounds the toy denoiser: codec, text encoder, sampling, and the checkpoint that holds them all.

Nothing here is learned except the denoiser: the codec is an orthonormal transform and text features are hashes, so
a test can compute by hand what they should give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F

from hooktuner.errors import ModelError
from hooktuner.family import SampleRequest
from hooktuner.randomness import derive_seed, generator
from hooktuner.testing.toy_model import ToyDenoiser

FRAMES = 4
"""Pixel frames of a latent frame, except the first, which holds one."""
EDGE = 8
"""Pixel rows and columns of a latent."""
CHANNELS = 8
TEXT_WIDTH = 32
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PART_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("text_encoder",),
    "vae": ("vae",),
    "denoiser": ("transformer",),
    "pipeline": ("vae", "scheduler"),
}
"""The folders of a checkpoint that each part is loaded from."""


class ToyCodec(ConfigMixin):
    """A "VAE" that is a fixed orthonormal transform of blocks of 4 x 8 x 8 pixels.

    Channels: mean of red, green, blue; brightness gradient across columns and across rows; change of red, green, blue
    over time. The first frame is encoded alone, so its last three channels are 0. Encoding what was decoded gives the
    same latents back (for latents that keep that zero).
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, scaling_factor: float = 2.0) -> None:
        self.basis = _codec_basis()
        self.device = torch.device("cpu")

    def to(self, device: torch.device | str) -> ToyCodec:
        """Move to a device."""
        self.device = torch.device(device)
        self.basis = self.basis.to(self.device)
        return self

    def encode(self, pixels_BCFHW: Tensor) -> Tensor:
        """Latents (B, 8, (F−1)/4 + 1, H/8, W/8) of pixels (B, 3, F, H, W) in [−1, 1]; F = 4k+1."""
        pixels = pixels_BCFHW.float()
        first = pixels[:, :, :1].expand(-1, -1, FRAMES - 1, -1, -1)
        blocks = torch.cat([first, pixels], dim=2)
        # the rows of the basis have unit norm; dividing makes a channel mean of 1 a latent of `scaling_factor`
        scale = self.config["scaling_factor"] / math.sqrt(FRAMES * EDGE * EDGE)
        return F.conv3d(blocks, self.basis, stride=(FRAMES, EDGE, EDGE)) * scale

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Pixels (B, 3, 4(F−1)+1, 8H, 8W), not clamped."""
        scale = math.sqrt(FRAMES * EDGE * EDGE) / self.config["scaling_factor"]
        blocks = F.conv_transpose3d(latents_BCFHW.float() * scale, self.basis, stride=(FRAMES, EDGE, EDGE))
        return torch.cat([blocks[:, :, :FRAMES].mean(dim=2, keepdim=True), blocks[:, :, FRAMES:]], dim=2)


def _codec_basis() -> Tensor:
    """(8, 3, FRAMES, EDGE, EDGE), orthonormal."""

    def wave(count: int) -> Tensor:
        return torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count)

    ones_t, ones_s = torch.ones(FRAMES, dtype=torch.float64), torch.ones(EDGE, dtype=torch.float64)
    colours, grey = torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    factors = [(colour, ones_t, ones_s, ones_s) for colour in colours]
    factors += [(grey, ones_t, ones_s, wave(EDGE)), (grey, ones_t, wave(EDGE), ones_s)]
    factors += [(colour, wave(FRAMES), ones_s, ones_s) for colour in colours]
    rows = [torch.einsum("c,t,h,w->cthw", *factor) for factor in factors]
    return torch.stack([row / row.norm() for row in rows]).float()


class ToyTextEncoder(ConfigMixin):
    """Text features that are hashes: a start token, then one feature vector per word, which depends on word and place.

    Captions of different length give different numbers of tokens; nothing is padded.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = TEXT_WIDTH) -> None:
        pass

    def encode(self, caption: str, max_tokens: int) -> Tensor:
        """(L, width) with 1 ≤ L ≤ `max_tokens`; float32 on the CPU."""
        words = ["", *caption.split()][:max_tokens]
        width = self.config["width"]
        return torch.stack(
            [torch.randn(width, generator=generator(0, f"word:{word}", place)) for place, word in enumerate(words)]
        )


class ToyPipeline:
    """The `SamplingPipeline` of the toy family: Euler steps over diffusers' flow-matching scheduler, with guidance."""

    def __init__(self, codec: ToyCodec, scheduler: Any, *, wants_image: bool) -> None:
        self.codec = codec
        self.scheduler = scheduler
        self.wants_image = wants_image

    @torch.no_grad()
    def sample(self, denoiser: torch.nn.Module, request: SampleRequest) -> Any:
        """uint8 frames (F, height, width, 3), or latents_CFHW where `request.latents_only`."""
        device = next(denoiser.parameters()).device
        shape = (1, CHANNELS, (request.frames - 1) // FRAMES + 1, request.height // EDGE, request.width // EDGE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed)).to(device)
        given, mask = self._given(request, noise)
        prompts = [request.prompt]
        if request.guidance != 1.0:
            prompts.append(request.negative)
        text, text_mask = pad_text([entry["words_LD"].to(device) for entry in prompts])
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / request.steps, request.steps).tolist(), device=device)
        self.scheduler.set_begin_index(0)
        latents = torch.where(mask, given, noise)
        for timestep in self.scheduler.timesteps:
            velocities = denoiser(
                hidden_states=latents.expand(len(prompts), -1, -1, -1, -1),
                timestep=timestep.expand(len(prompts)),
                encoder_hidden_states=text,
                encoder_attention_mask=text_mask,
                given_mask=mask.expand(len(prompts), *mask.shape[1:]),
                return_dict=False,
            )[0].float()
            velocity = velocities[:1]
            if len(prompts) == 2:
                velocity = velocities[1:] + request.guidance * (velocity - velocities[1:])
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            latents = torch.where(mask, given, latents)
        if request.latents_only:
            return latents[0]
        pixels = self.codec.decode(latents.to(self.codec.device))[0].clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

    def _given(self, request: SampleRequest, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Given latents and where they are given (1, 1, F, H, W)."""
        mask = torch.zeros_like(noise[:, :1], dtype=torch.bool)
        if not self.wants_image:
            return noise, mask
        if request.image is None:
            raise ModelError(
                "toy-i2v — there is no first frame to sample from. Name a dataset with eval_dataset_id and set "
                "validation_using_datasets, or set validation_disable."
            )
        image = request.image.convert("RGB").resize((request.width, request.height))
        pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None, :, None] / 127.5 - 1
        mask[:, :, 0] = True
        first = self.codec.encode(pixels.to(self.codec.device)).to(noise.device)
        return first.expand_as(noise), mask

    def load_adapter(self, denoiser: torch.nn.Module, path: Path) -> None:
        """Load an exported adapter (the file, or its folder) through diffusers' loader for models."""
        file = path / ADAPTER_FILE if path.is_dir() else path
        if not file.is_file():
            raise ModelError(f"{file} — there is no adapter. Name an adapter file, or the folder that holds one.")
        before = set(getattr(denoiser, "peft_config", {}))
        denoiser.load_lora_adapter(  # type: ignore[operator]
            str(file.parent), weight_name=file.name, prefix="transformer", local_files_only=True
        )
        if not set(getattr(denoiser, "peft_config", {})) - before:
            raise ModelError(f"{file} — no key of it fits the toy denoiser, so nothing was loaded. Use a toy adapter.")


def pad_text(text: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, L, D) and its mask (B, L), True for real tokens, from (L_i, D) each."""
    padded = torch.nn.utils.rnn.pad_sequence(list(text), batch_first=True)
    lengths = torch.tensor([len(entry) for entry in text], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def build_checkpoint(folder: Path, *, seed: int = 0, **sizes: int) -> None:
    """Write a complete toy checkpoint in the diffusers layout: random weights, the same for the same seed.

    `sizes` are arguments of `ToyDenoiser`. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "toy-checkpoint"))
        denoiser = ToyDenoiser(channels=CHANNELS, text_width=TEXT_WIDTH, **sizes)
    denoiser.save_pretrained(folder / "transformer")
    ToyCodec().save_config(folder / "vae")
    ToyTextEncoder().save_config(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")


def load_part(folder: Path | str, part: str, *, dtype: torch.dtype | None, wants_image: bool) -> Any:
    """One part of a checkpoint: `text_encoder`, `vae`, `denoiser` or `pipeline`.

    Errors: `ModelError` where the folder holds no such part.
    """
    loaders: Mapping[str, Any] = {
        "text_encoder": lambda: _from_config(ToyTextEncoder, folder, "text_encoder"),
        "vae": lambda: _from_config(ToyCodec, folder, "vae"),
        "denoiser": lambda: ToyDenoiser.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype or torch.float32, local_files_only=True
        ),
        "pipeline": lambda: ToyPipeline(
            _from_config(ToyCodec, folder, "vae"),
            FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True),
            wants_image=wants_image,
        ),
    }
    missing = [name for name in PART_FOLDERS[part] if not (Path(folder) / name).is_dir()]
    if missing:
        raise ModelError(
            f"{folder} — the {part} of the toy model cannot be loaded: there is no folder {missing[0]}/ in it. Give "
            "pretrained_model_name_or_path a folder made by hooktuner.testing.build_checkpoint, or leave it out."
        )
    return loaders[part]()


def _from_config(kind: Any, folder: Path | str, subfolder: str) -> Any:
    return kind.from_config(kind.load_config(folder, subfolder=subfolder, local_files_only=True))
