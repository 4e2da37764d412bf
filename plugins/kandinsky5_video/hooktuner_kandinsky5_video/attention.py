"""Sparse (NABLA) attention: its parameters, and the set-up that makes it sparse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
from hooktuner.context import Run
from hooktuner.errors import ModelError

from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.card import nabla_refusal
from hooktuner_kandinsky5_video.geometry import NABLA_SIZE_MULTIPLE, SPATIAL_STRIDE, RopeScale, rope_scale, wants_nabla
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions


def unwrapped(denoiser: Any) -> Any:
    """The diffusers model inside wrappers for compilation and distribution."""
    for name in ("_orig_mod", "module"):
        inner = getattr(denoiser, name, None)
        if isinstance(inner, torch.nn.Module):
            return unwrapped(inner)
    return denoiser


def scale_of(run: Run, height: int, width: int) -> RopeScale:
    """The rope scale of clips of this size in pixels, in training and in sampling."""
    rule = run.options_of(NAME, Kandinsky5VideoOptions).rope_scale
    return rope_scale(run.flavour.settings["rope_scale"] if rule == "auto" else rule, height, width)


def sparse_params(run: Run, denoiser: Any, latents_BFHWC: torch.Tensor) -> dict[str, Any] | None:
    """What the denoiser wants as `sparse_params` for these latents: None for dense attention.

    Prepares the denoiser for NABLA at the first clip that needs it.
    Errors: `ModelError` where NABLA is needed and the device or the size does not allow it.
    """
    _, frames, rows, columns, _ = latents_BFHWC.shape
    height, width = rows * SPATIAL_STRIDE, columns * SPATIAL_STRIDE
    model = unwrapped(denoiser)
    choice = run.options_of(NAME, Kandinsky5VideoOptions).sparse_attention
    if not wants_nabla(choice, model.config.attention_type, frames, height, width):
        return None
    device = latents_BFHWC.device
    where = f"clips of {width}x{height} pixels and {frames} latent frames"
    if device.type != "cuda":
        raise ModelError(str(nabla_refusal(where, device.type)))
    if height % NABLA_SIZE_MULTIPLE or width % NABLA_SIZE_MULTIPLE:
        raise ModelError(
            f"{where} — NABLA attention works on tiles of {NABLA_SIZE_MULTIPLE} pixels. "
            f'Choose a resolution in multiples of {NABLA_SIZE_MULTIPLE}, or set "sparse_attention": "dense".'
        )
    prepare_nabla(model)
    return nabla_params(model.config, latents_BFHWC)


def nabla_params(config: Any, latents_BFHWC: torch.Tensor) -> dict[str, Any]:
    """The NABLA parameters of the pipeline's own `get_sparse_params`, which reads nothing but the denoiser's config."""
    stand_in = SimpleNamespace(
        transformer=SimpleNamespace(config=config), fast_sta_nabla=Kandinsky5T2VPipeline.fast_sta_nabla
    )
    return Kandinsky5T2VPipeline.get_sparse_params(stand_in, latents_BFHWC, latents_BFHWC.device)  # type: ignore[arg-type]


def prepare_nabla(model: Any) -> None:
    """Let the visual self-attentions use compiled flex attention; does nothing the second time.

    Only compiled flex attention skips blocks: the mask has no mask function, so the eager version computes full
    attention. Text and cross attention keep their backend.
    """
    for block in model.visual_transformer_blocks:
        if block.self_attention._compiled_call_impl is None:
            block.self_attention.set_attention_backend("flex")
            block.self_attention.compile()
