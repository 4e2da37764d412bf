"""Clips to latents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from hooktuner.context import Run
from hooktuner.errors import ModelError
from hooktuner.randomness import generator

from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions


def encode_clips(run: Run, vae: Any, pixels_BCFHW: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Latents of clips with pixels in [−1, 1]: the posterior's mode times the VAE's scaling factor (there is no
    shift), float32, (B, 16, (F−1)/4+1, H/8, W/8).

    Flavours that are conditioned on a first frame also get `first_latent` (B, 16, 1, H/8, W/8): the first frame
    encoded alone, as the pipeline encodes the user's image. It is not the first latent frame of the clip, because the
    VAE's normalisation and attention span time.

    Errors: `ModelError` for a number of frames or a size that the VAE would not keep.
    """
    _refuse_lossy_shapes(run, pixels_BCFHW)
    options = run.options_of(NAME, Kandinsky5VideoOptions)
    encoded = {"latents": _encode(vae, pixels_BCFHW, options.vae_sample_posterior)}
    if "first_frame" in run.flavour.conditioning:
        encoded["first_latent"] = _encode(vae, pixels_BCFHW[:, :, :1], options.vae_sample_posterior)
    return encoded


def _encode(vae: Any, pixels_BCFHW: torch.Tensor, sample: bool) -> torch.Tensor:
    with torch.no_grad():
        posterior = vae.encode(pixels_BCFHW.to(vae.dtype)).latent_dist
    latents_BCFHW = posterior.mode().float()
    if sample:
        noise_BCFHW = torch.stack([_noise_of(clip_CFHW, latents_BCFHW.shape[1:]) for clip_CFHW in pixels_BCFHW])
        latents_BCFHW = latents_BCFHW + posterior.std.float() * noise_BCFHW.to(latents_BCFHW.device)
    return latents_BCFHW * vae.config.scaling_factor


def _noise_of(clip_CFHW: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Noise that is a function of the clip, so that an interrupted and repeated encoding gives the same latents."""
    pixels = clip_CFHW.float().cpu().contiguous().numpy().tobytes()
    fingerprint = int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "big")
    return torch.randn(shape, generator=generator(0, "vae-posterior", fingerprint))


def _refuse_lossy_shapes(run: Run, pixels_BCFHW: torch.Tensor) -> None:
    """The VAE drops trailing frames and pixels silently."""
    assert run.card is not None
    spec = run.card.latents_of(run.flavour.name)
    frames, height, width = pixels_BCFHW.shape[2:]
    why = spec.frames.problem(frames)
    if why is not None:
        raise ModelError(f"num_frames — {why}. Set num_frames of the dataset accordingly.")
    if height % spec.size_multiple or width % spec.size_multiple:
        raise ModelError(
            f"resolution — clips of {width}x{height} pixels do not fit: width and height must be multiples of "
            f"{spec.size_multiple}. Choose another resolution."
        )
