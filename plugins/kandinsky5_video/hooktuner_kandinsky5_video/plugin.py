"""The plugin: hook methods that hand over to the module that does the work.

This module is imported by `tuner plugins` and `tuner config check`, so nothing here imports torch or diffusers
before a hook needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hooktuner import hookimpl
from hooktuner.family import ModelCard, Part

from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions

if TYPE_CHECKING:
    import torch
    from hooktuner.config import PluginOptions
    from hooktuner.context import Run
    from hooktuner.step import Conditioning, Step


class Kandinsky5Video:
    """The model family `kandinsky5-video`."""

    aliases = ("kandinsky5video", "kandinsky-5-video", "k5-video")

    @hookimpl
    def options(self) -> type[PluginOptions]:
        """The config keys of this family."""
        return Kandinsky5VideoOptions

    @hookimpl
    def describe_model(self) -> ModelCard:
        """The card: flavours, defaults, rules."""
        from hooktuner_kandinsky5_video.card import CARD

        return CARD

    @hookimpl
    def load_model(self, run: Run, part: Part) -> Any:
        """One part of the checkpoint, loaded by diffusers' own `from_pretrained`."""
        from hooktuner_kandinsky5_video.load import load_part

        return load_part(run, part)

    @hookimpl
    def encode_text(self, run: Run, encoder: Any, captions: Sequence[str]) -> Sequence[Mapping[str, torch.Tensor]]:
        """`{"qwen_LD", "clip_D"}` of each caption, from the pipeline's own `encode_prompt`."""
        from hooktuner_kandinsky5_video.text import encode_captions

        return encode_captions(run, encoder, captions)

    @hookimpl
    def encode_latents(self, run: Run, vae: Any, pixels_BCFHW: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """`{"latents"}`, and `first_latent` for flavours that are conditioned on a first frame."""
        from hooktuner_kandinsky5_video.latents import encode_clips

        return encode_clips(run, vae, pixels_BCFHW)

    @hookimpl
    def condition(self, run: Run, step: Step) -> Conditioning | None:
        """The clean first latent frame of image-to-video samples."""
        from hooktuner_kandinsky5_video.predict import condition

        return condition(run, step)

    @hookimpl
    def predict(self, run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor:
        """The velocity of the micro-batch."""
        from hooktuner_kandinsky5_video.predict import predict

        return predict(run, denoiser, step)
