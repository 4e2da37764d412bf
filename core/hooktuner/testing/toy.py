"""`ToyFamily`: a complete, small model family for tests of core and of techniques, with only core installed.

It fills every slot hook with real torch code (`toy_model`, `toy_parts`) and is as light to import as a plugin must
be. Flavours: `toy` (text to video) and `toy-i2v` (first frame to video), both built offline.

    hooktuner.run(make_project(tmp_path), plugins=[ToyFamily()])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from hooktuner.config import PluginOptions
from hooktuner.context import Run
from hooktuner.errors import ModelError, Problem
from hooktuner.family import Anatomy, Flavour, FrameRule, LatentSpec, ModelCard, Part
from hooktuner.hookspecs import hookimpl
from hooktuner.randomness import uniform
from hooktuner.step import Conditioning, Step

if TYPE_CHECKING:
    import torch


class ToyOptions(PluginOptions):
    """The config keys of the toy family."""

    toy_caption_tokens: int = Field(32, ge=1, description="Caption tokens that are kept; the rest is cut off.")
    toy_first_frame_probability: float = Field(
        1.0, ge=0, le=1, description="toy-i2v: share of samples whose first frame is given; the rest is text to video."
    )

    cache_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": ("toy_caption_tokens",)}

    def problems(self, run: Run) -> Iterable[Problem]:
        """The share of given first frames means nothing for the flavour that has none."""
        if "toy_first_frame_probability" in self.model_fields_set and not run.flavour.conditioning:
            yield Problem(
                "toy_first_frame_probability",
                f'the flavour "{run.flavour.name}" is not conditioned on a first frame',
                'Remove it, or set "model_flavour": "toy-i2v".',
            )


def _build(folder: Path) -> None:
    from hooktuner.testing.toy_parts import build_checkpoint

    build_checkpoint(folder)


def _anatomy(run: Run) -> Anatomy:
    from hooktuner.testing.toy_model import ToyAnatomy

    return ToyAnatomy()


class ToyFamily:
    """The plugin. Hand an instance to `hooktuner.run(..., plugins=[ToyFamily()])`."""

    name = "toy"

    @hookimpl
    def options(self) -> type[PluginOptions]:
        """Two keys, so that tests of option handling have something to hold."""
        return ToyOptions

    @hookimpl
    def describe_model(self, run: Run) -> ModelCard:
        """The card."""
        flavours = [
            Flavour("toy", "text to video, 0.4 M random parameters", build=_build),
            Flavour("toy-i2v", "first frame to video", build=_build, conditioning=frozenset({"first_frame"})),
        ]
        return ModelCard(
            name="toy",
            summary="A small video transformer with random weights, for tests",
            media="video",
            flavours={flavour.name: flavour for flavour in flavours},
            default_flavour="toy",
            latents=LatentSpec(channels=8, spatial_stride=8, frames=FrameRule(stride=4, maximum=121), size_multiple=16),
            lora_targets=r"(text_)?blocks\.\d+\.((cross_)?attention\.to_(q|k|v|out)|feed_forward\.(up|down))",
            defaults={
                "frame_rate": 8.0,
                "flow_schedule_shift": 3.0,
                "validation_resolution": "32x32",
                "validation_num_video_frames": 9,
                "validation_guidance": 2.0,
                "validation_negative_prompt": "",
            },
            offers=frozenset({"blocks", "token_routing", "frames"}),
            anatomy=_anatomy,
        )

    @hookimpl
    def load_model(self, run: Run, part: Part) -> Any:
        """One part of the checkpoint at `run.model_path`."""
        from hooktuner.testing.toy_parts import load_part

        if run.model_path is None:
            raise ModelError("toy — the run has no model_path. Core sets it before it loads a model.")
        wants_image = "first_frame" in run.flavour.conditioning
        loaded = load_part(run.model_path, part.value, dtype=run.weight_dtype, wants_image=wants_image)
        if part is Part.VAE and run.device is not None:
            loaded.to(run.device)
        return loaded

    @hookimpl
    def encode_text(self, run: Run, encoder: Any, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """`words_LD`: one feature vector per word, after a start token."""
        tokens = run.options_of("toy", ToyOptions).toy_caption_tokens
        return [{"words_LD": encoder.encode(caption, tokens)} for caption in captions]

    @hookimpl
    def encode_latents(self, run: Run, vae: Any, pixels_BCFHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents, and for `toy-i2v` the first frame encoded alone."""
        encoded = {"latents": vae.encode(pixels_BCFHW)}
        if "first_frame" in run.flavour.conditioning:
            encoded["first_latent"] = vae.encode(pixels_BCFHW[:, :, :1])
        return encoded

    @hookimpl
    def condition(self, run: Run, step: Step) -> Conditioning | None:
        """`toy-i2v`: the first latent frame is given, in a share of the samples."""
        import torch

        if "first_frame" not in run.flavour.conditioning:
            return None
        share = run.options_of("toy", ToyOptions).toy_first_frame_probability
        chosen = [uniform(run.config.seed, "toy-first-frame", index) < share for index in step.batch.index]
        latents = step.batch.latents_BCFHW
        given = torch.zeros(len(chosen), 1, latents.shape[2], 1, 1, dtype=torch.bool, device=latents.device)
        given[:, :, 0] = torch.tensor(chosen, device=latents.device)[:, None, None, None]
        return Conditioning(given_B1FHW=given, latents_BCFHW=step.batch.extras["first_latent"])

    @hookimpl
    def predict(self, run: Run, denoiser: torch.nn.Module, step: Step) -> torch.Tensor:
        """Velocity of the noised input."""
        from hooktuner.testing.toy_parts import pad_text

        text, mask = pad_text([sample["words_LD"] for sample in step.batch.text])
        given = None
        if step.conditioning is not None:
            batch, _, frames, height, width = step.noisy_BCFHW.shape
            given = step.conditioning.given_B1FHW.expand(batch, 1, frames, height, width)
        return denoiser(
            hidden_states=step.noisy_BCFHW,
            timestep=step.timestep_B,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            given_mask=given,
            return_dict=False,
        )[0]
