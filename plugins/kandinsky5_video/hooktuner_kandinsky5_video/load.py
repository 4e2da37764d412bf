"""Load the parts of a checkpoint in the diffusers layout, each through its own `from_pretrained`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
from diffusers.pipelines.kandinsky5.pipeline_kandinsky_i2v import Kandinsky5I2VPipeline
from hooktuner.context import Run
from hooktuner.errors import ModelError
from hooktuner.family import Part
from safetensors import SafetensorError

from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.card import nabla_refusal
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions
from hooktuner_kandinsky5_video.patch_conv import enable_patch_conv
from hooktuner_kandinsky5_video.processor import TextProcessor

FLOAT32_MODULES = ("time_embeddings", "modulation", "visual_modulation", "text_modulation")
"""What `Kandinsky5Transformer3DModel` keeps in float32 however it is loaded."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Pipeline = Kandinsky5T2VPipeline | Kandinsky5I2VPipeline


def pipeline_class(run: Run) -> type[Kandinsky5T2VPipeline] | type[Kandinsky5I2VPipeline]:
    """The diffusers pipeline of the run's flavour."""
    return Kandinsky5I2VPipeline if "first_frame" in run.flavour.conditioning else Kandinsky5T2VPipeline


def load_part(run: Run, part: Part) -> Any:
    """One part of the checkpoint at `run.model_path`.

    text encoder: the diffusers pipeline with nothing but Qwen2.5-VL, CLIP and their tokenizers, in
    `run.compute_dtype`, on `run.device`. VAE: `AutoencoderKLHunyuanVideo` in `vae_dtype`, on `run.device`.
    Denoiser: `Kandinsky5Transformer3DModel` in `run.weight_dtype` (time embeddings and modulations stay in float32;
    never call `.to(dtype)` on it), on the CPU. Pipeline: `Kandinsky5Sampler`.

    Errors: `ModelError` naming the folder or hub id, why, and what to do.
    """
    path = _checkpoint(run)
    try:
        if part is Part.TEXT_ENCODER:
            return _load_text_encoder(run, path)
        if part is Part.VAE:
            return load_vae(run, DTYPES[_options(run).vae_dtype])
        if part is Part.DENOISER:
            return _load_denoiser(run, path)
        from hooktuner_kandinsky5_video.sampling import Kandinsky5Sampler

        return Kandinsky5Sampler(run)
    except (OSError, ValueError, RuntimeError, SafetensorError) as failure:
        # What is missing or broken is on disk or on the hub, so these are the user's to mend; torch reports weights
        # of another shape as RuntimeError, and so running out of memory.
        reason = " ".join(str(failure).split())[:600] or type(failure).__name__
        raise ModelError(
            f"{path} — the part {part.value!r} cannot be loaded: {reason} "
            "Check that it is a checkpoint in the diffusers layout (pretrained_model_name_or_path) and, for a hub id, "
            "that this machine has a connection or a complete download."
        ) from failure


def load_vae(run: Run, dtype: torch.dtype) -> AutoencoderKLHunyuanVideo:
    """The VAE on `run.device`, with the memory switches of the options."""
    options = _options(run)
    vae: Any = AutoencoderKLHunyuanVideo.from_pretrained(_checkpoint(run), subfolder="vae", dtype=dtype)
    vae.eval().requires_grad_(False).to(run.device)
    vae.use_framewise_encoding = vae.use_framewise_decoding = options.vae_framewise
    if options.vae_enable_tiling:
        vae.enable_tiling()
    if options.vae_enable_slicing:
        vae.enable_slicing()
    if options.vae_enable_patch_conv:
        enable_patch_conv(vae)
    return vae


def _load_text_encoder(run: Run, path: str) -> Pipeline:
    pipeline = pipeline_class(run).from_pretrained(
        path,
        transformer=None,
        vae=None,
        scheduler=None,
        tokenizer=TextProcessor.from_pretrained(path, subfolder="tokenizer"),
        dtype=run.compute_dtype,
    )
    return pipeline.to(run.device)


def _load_denoiser(run: Run, path: str) -> Kandinsky5Transformer3DModel:
    denoiser = Kandinsky5Transformer3DModel.from_pretrained(path, subfolder="transformer", dtype=run.weight_dtype)
    compute_in_float32(denoiser)
    if _options(run).sparse_attention == "nabla":
        if denoiser.config["attention_type"] != "nabla":
            raise ModelError(
                f"{path} — its denoiser was trained with dense attention, and sparse_attention asks for NABLA. "
                'Use "auto" or "dense".'
            )
        if run.device is not None and run.device.type != "cuda":
            raise ModelError(str(nabla_refusal("sparse_attention", run.device.type)))
    return denoiser


def compute_in_float32(denoiser: torch.nn.Module) -> None:
    """Let the modules that the model keeps in float32 also compute in float32 under autocast.

    The released pipelines run without autocast, so time embeddings and modulations are float32 there; training under
    bfloat16 autocast would round them. Only the instances are wrapped; classes stay as they are.
    """
    for name, module in denoiser.named_modules():
        if name.rpartition(".")[2] in FLOAT32_MODULES:
            module.forward = _without_autocast(module.forward)


def _without_autocast(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    @functools.wraps(forward)
    def wrapped(value: torch.Tensor) -> torch.Tensor:
        with torch.autocast(value.device.type, enabled=False):
            return forward(value.float())

    return wrapped


def _checkpoint(run: Run) -> str:
    """The checkpoint as a string; a local path must exist."""
    path = str(run.model_path)
    looks_local = Path(path).is_absolute() or path.startswith(("./", "../", "~")) or path.count("/") != 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(
            f"{path} — there is no such folder. Give pretrained_model_name_or_path the folder of a checkpoint in the "
            "diffusers layout, or a hub id, or leave it out."
        )
    return str(Path(path).expanduser()) if looks_local else path


def _options(run: Run) -> Kandinsky5VideoOptions:
    return run.options_of(NAME, Kandinsky5VideoOptions)
