"""The teacher: DINOv2 patch features of the frames that the latent frames stand for.

Frames keep their aspect ratio, are resized so that they have the wanted area and whole patches, and are normalised as
ImageNet; the features are the patch tokens after the last layer norm (`x_norm_patchtokens` of the authors' code),
without class token and registers.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hooktuner.context import Run
from hooktuner.errors import DataError, ModelError
from hooktuner.randomness import derive_seed
from hooktuner.technique import Clip
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model

from hooktuner_crepa.frames import source_frames
from hooktuner_crepa.options import ENCODERS, TINY, CrepaOptions

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WIDTHS = {"dinov2_vitg14": 1536, "dinov2_vitl14": 1024, "dinov2_vitb14": 768, "dinov2_vits14": 384, TINY: 32}
"""Feature widths of the encoders that have a name, so that training need not look for a checkpoint."""
KINDS = ("dinov2", "dinov2_with_registers")
"""The `model_type`s of transformers that give patch tokens in raster order after class token and registers."""
STORED = torch.float16
"""Features lie behind a layer norm: float16 holds them with eight times the precision of bfloat16."""


def encode_clip(run: Run, options: CrepaOptions, encoder: torch.nn.Module, clip: Clip) -> Tensor:
    """Features of a clip: (F, patch rows, patch columns, width), float16 on the CPU, one per latent frame.

    Only frames that a latent frame stands for are encoded. With the frame map `mean` the features of a group are
    scaled to length 1 and averaged. Errors: `DataError` where the clip's frames do not fit the latents.
    """
    assert run.card is not None
    frames = clip.latent_shape[1]
    stride = run.card.latents_of(run.flavour.name).frames.stride
    try:
        groups = source_frames(options.crepa_frame_map, len(clip.frames_FHWC), frames, stride)
    except ValueError as failure:
        raise DataError(f"{clip.key} — {failure}; CREPA cannot tell which frames belong together.") from failure
    wanted = [frame for group in groups for frame in group]
    size = encoder_size(clip.frames_FHWC.shape[1:3], options.crepa_encoder_image_size, patch_size(encoder))
    batch = options.crepa_encoder_frames_batch_size
    batch = len(wanted) if batch == -1 else batch
    parts = [
        _encode(encoder, clip.frames_FHWC[wanted[begin : begin + batch]], size)
        for begin in range(0, len(wanted), batch)
    ]
    features_TRCD = torch.cat(parts)
    if options.crepa_frame_map == "mean":
        unit = F.normalize(features_TRCD, dim=-1)
        features_TRCD = torch.stack([part.mean(0) for part in unit.split([len(group) for group in groups])])
    return features_TRCD.to(STORED).cpu()


def _encode(encoder: torch.nn.Module, frames_THWC: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Patch features (T, rows, columns, width) in float32 on the encoder's device."""
    parameter = next(encoder.parameters())
    pixels = torch.from_numpy(frames_THWC).to(parameter.device).permute(0, 3, 1, 2).float().div(255)
    pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        tokens_TND = encoder(((pixels - mean) / std).to(parameter.dtype)).last_hidden_state
    patch = patch_size(encoder)
    first = 1 + getattr(encoder.config, "num_register_tokens", 0)
    return tokens_TND[:, first:].float().unflatten(1, (size[0] // patch, size[1] // patch))


def encoder_size(frame: tuple[int, ...], edge: int, patch: int) -> tuple[int, int]:
    """(height, width) of the encoder's input for a frame of (height, width) pixels: about `edge`² pixels in the
    frame's aspect ratio, in whole patches."""
    height, width = frame
    scale = edge / math.sqrt(height * width) / patch
    rows, columns = (max(1, round(side * scale)) for side in (height, width))
    return rows * patch, columns * patch


def patch_size(encoder: torch.nn.Module) -> int:
    """Edge of a patch in pixels."""
    return int(encoder.config.patch_size)  # type: ignore[union-attr, arg-type]


def load_encoder(run: Run, name: str) -> torch.nn.Module:
    """The frozen encoder on `run.device` in `run.weight_dtype`.

    `name`: a value of `crepa_encoder`. Errors: `ModelError` where it cannot be had, or is no DINOv2.
    """
    if name == TINY:
        with tempfile.TemporaryDirectory() as folder:
            build_tiny(Path(folder))
            encoder = _load(AutoModel, name, folder, dtype=torch.float32)
    else:
        _check_kind(name)
        encoder = _load(AutoModel, name, _place(name), dtype=run.weight_dtype)
    return encoder.to(device=run.device, dtype=run.weight_dtype).eval().requires_grad_(False)


def feature_width(name: str) -> int:
    """Width of the encoder's features; for a hub id or a folder from its config. Errors: `ModelError`."""
    return WIDTHS[name] if name in WIDTHS else int(_check_kind(name).hidden_size)


def build_tiny(folder: Path) -> None:
    """Write a DINOv2 checkpoint with random weights: 32 wide, two layers, patches of 14 pixels. The same weights every
    time; the random state stays as it was. Layer scales are 1, so that the layers do something."""
    config = Dinov2Config(
        hidden_size=WIDTHS[TINY],
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        layerscale_value=1.0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "crepa-tiny-encoder"))
        Dinov2Model(config).save_pretrained(folder)


def _check_kind(name: str) -> Any:
    config = _load(AutoConfig, name, _place(name))
    if config.model_type not in KINDS:
        raise ModelError(
            f"crepa_encoder — {name} is a {config.model_type}, not a DINOv2. Give a DINOv2 with or without registers."
        )
    return config


def _place(name: str) -> str:
    return ENCODERS.get(name) or str(Path(name).expanduser() if name.startswith("~") else name)


def _load(kind: Any, name: str, place: str, **more: Any) -> Any:
    try:
        return kind.from_pretrained(place, **more)
    except (OSError, ValueError, RuntimeError) as failure:  # missing, damaged, or of another shape: the user's to mend
        reason = " ".join(str(failure).split())[:400]
        raise ModelError(
            f"crepa_encoder — {name} ({place}) cannot be loaded: {reason} Without a network, download {place} "
            "elsewhere and give its folder."
        ) from failure
