"""The config keys of the family. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from hooktuner.config import Flag, PluginOptions
from pydantic import Field


class Kandinsky5VideoOptions(PluginOptions):
    """Options of `kandinsky5-video`.

    `vae_enable_patch_conv` and `vae_enable_slicing` are not in the cache key: they change the order of the work, not
    what is computed (differences stay at the level of float rounding, like those of `vae_batch_size`).
    """

    cache_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text": ("tokenizer_max_length",),
        "latents": ("vae_dtype", "vae_enable_tiling", "vae_framewise", "vae_sample_posterior"),
    }

    vae_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Number format in which clips are encoded: `fp32`, or `bf16` for half the memory and slightly "
        "different latents.",
    )
    vae_enable_patch_conv: Flag = Field(
        False,
        description="Compute the VAE's causal convolutions in short runs of frames with exact overlap: lower peak "
        "memory, a little slower, the same latents.",
    )
    vae_enable_tiling: Flag = Field(
        False,
        description="Encode and decode frames larger than 256 pixels in overlapping tiles of 256 pixels that are "
        "blended: much less memory, slightly different latents.",
    )
    vae_enable_slicing: Flag = Field(
        False, description="Encode and decode the clips of a batch one after the other: less memory, same latents."
    )
    vae_framewise: Flag = Field(
        True,
        description="Encode and decode clips longer than 16 frames in overlapping runs of 17 frames that are blended, "
        "as the released pipeline does; `false` takes the whole clip at once: more memory, other latents.",
    )
    vae_sample_posterior: Flag = Field(
        False,
        description="Cache a sample of the VAE's posterior instead of its mode. The sample's noise is a function of "
        "the clip, so encoding twice gives the same latents.",
    )
    tokenizer_max_length: int = Field(
        512,
        ge=1,
        le=1024,
        description="Longest caption in tokens; what is beyond is cut. 512 is the pipeline's default, 1024 the most "
        "that the model has positions for.",
    )
    i2v_dropout_probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of samples that an image-to-video flavour trains as text-to-video (no given first frame).",
    )
    rope_scale: Literal["auto", "sd", "hd", "pipeline"] = Field(
        "auto",
        description="Divisor of the row and column positions: `sd` = 2, `hd` = 3.16, `pipeline` = the rule of the "
        "diffusers pipeline (2 when both edges are 480 to 854 pixels, else 3.16), `auto` = 2 up to 854 pixels and "
        "3.16 beyond, which differs from the pipeline below 480 pixels only.",
    )
    sparse_attention: Literal["auto", "dense", "nabla"] = Field(
        "auto",
        description="Attention of checkpoints that were trained with NABLA: `dense`, `nabla` (CUDA only), or `auto` = "
        "NABLA for clips of more than 121 frames or an edge of more than 854 pixels, dense for smaller ones.",
    )
