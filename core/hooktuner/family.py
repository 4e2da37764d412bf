"""What a model family supplies: its card, its parts, and the anatomy of its denoiser.

Shape suffixes, used in the whole of hooktuner:

    B  samples in a micro-batch      C  channels          F  latent frames (T in some papers)
    H  latent rows   W  latent columns   N  tokens        D  token width   K  kept tokens
    L  text tokens

Nothing here imports torch at run time: cards are read by `tuner plugins` and `tuner config check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hooktuner.errors import Problem

if TYPE_CHECKING:
    import torch

    from hooktuner.context import Run


class Part(StrEnum):
    """The parts of a model, loaded one at a time through `load_model(run, part)`."""

    TEXT_ENCODER = "text_encoder"
    """Whatever `encode_text` needs: encoders and tokenizers together. Any object with an optional `.to(device)`."""
    VAE = "vae"
    """Whatever `encode_latents` needs."""
    DENOISER = "denoiser"
    """The `torch.nn.Module` that is trained."""
    PIPELINE = "pipeline"
    """A `SamplingPipeline`: the family's diffusers pipeline without text encoders, used for validation."""


@dataclass(frozen=True)
class FrameRule:
    """Legal numbers of pixel frames: `stride * k + 1`, at most `maximum`.

    A causal video VAE encodes the first frame alone and then groups of `stride` frames; any other count silently
    loses trailing frames.
    """

    stride: int = 1
    maximum: int | None = None

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a clip with `frames` pixel frames."""
        return (frames - 1) // self.stride + 1

    def floor(self, frames: int) -> int:
        """The largest legal number that is not above `frames` (at least 1)."""
        if self.maximum is not None:
            frames = min(frames, self.maximum)
        return max(1, (frames - 1) // self.stride * self.stride + 1)

    def problem(self, frames: int) -> str | None:
        """Why `frames` is not legal, naming the nearest legal numbers; None where it is."""
        if self.maximum is not None and frames > self.maximum:
            return f"{frames} frames are more than the model's positions allow; at most {self.floor(frames)}"
        if frames >= 1 and (frames - 1) % self.stride == 0:
            return None
        lower = self.floor(max(frames, 1))
        upper = lower + self.stride
        nearest = f"{lower} or {upper}" if frames >= 1 else "1"
        return f"{frames} frames do not fit: the number must be {self.stride}k+1; the nearest are {nearest}"


@dataclass(frozen=True)
class LatentSpec:
    """The latent space. `size_multiple`: height and width in pixels must be multiples of it."""

    channels: int
    spatial_stride: int
    frames: FrameRule = FrameRule()
    size_multiple: int = 16

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip of `frames` pixel frames of `height` x `width` pixels."""
        return (
            self.channels,
            self.frames.latent_frames(frames),
            height // self.spatial_stride,
            width // self.spatial_stride,
        )


@dataclass(frozen=True)
class Flavour:
    """One released checkpoint of a family.

    `repository` is a hub id or folder in the diffusers layout. `build`, where given instead, writes such a folder
    offline (the `tiny` flavours); core calls it once and keeps the result. `defaults` and `latents` override the
    card's for this flavour.
    """

    name: str
    summary: str
    repository: str | None = None
    build: Callable[[Path], None] | None = None
    conditioning: frozenset[str] = frozenset()
    """What a sample is conditioned on besides its caption: `{"first_frame"}` for image-to-video."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    latents: LatentSpec | None = None
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """The family's own facts about the flavour; core does not read them."""


@dataclass(frozen=True)
class ModelCard:
    """All that core and techniques know of a family without loading it.

    `defaults` fills config keys that the user left out (`frame_rate`, `flow_schedule_shift`, `validation_guidance` …).
    `lora_targets` is a regular expression over full module names (peft's `target_modules` as a string).
    `offers` are the capabilities that techniques may need (`Technique.needs`).
    `check` is asked after the config is frozen and before anything is loaded, and again once `run.device` is known.
    """

    name: str
    summary: str
    media: Literal["video", "image"]
    flavours: Mapping[str, Flavour]
    default_flavour: str
    latents: LatentSpec
    lora_targets: str
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    offers: frozenset[str] = frozenset()
    check: Callable[[Run], Iterable[Problem]] | None = None
    check_clips: Callable[[Run, Iterable[tuple[int, int, int]]], Iterable[Problem]] | None = None
    """Asked once the clips are planned and the device is known, still before anything is loaded: what the model cannot
    do with clips of these (frames, height, width) in pixels on `run.device`."""
    anatomy: Callable[[Run], Anatomy] | None = None
    """Makes the anatomy of the denoiser; families without one offer nothing that works on blocks."""
    lora_prefix: str = "transformer"
    """Prefix of the keys in an exported adapter, and the folder of exported full weights."""

    def latents_of(self, flavour: str) -> LatentSpec:
        """The latent space of a flavour."""
        return self.flavours[flavour].latents or self.latents

    def defaults_of(self, flavour: str) -> dict[str, Any]:
        """The config defaults of a flavour: the card's, overridden by the flavour's."""
        return {**self.defaults, **self.flavours[flavour].defaults}


# ---------------------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class Grid:
    """The token grid of one block call: frames, rows, columns. `frames * rows * columns == N` of an unrouted call."""

    frames: int
    rows: int
    columns: int


@dataclass(frozen=True)
class BlockTokens:
    """The token-aligned view of one block call.

    tokens_BND: the sequence that the block transforms. sides: tensors with one entry per token, as (tensor, token
    axis), e.g. rotary tables; batch axis 0 where it has the batch's size or 1. grid: None where unknown.
    """

    tokens_BND: torch.Tensor
    sides: tuple[tuple[torch.Tensor, int], ...]
    grid: Grid | None


@dataclass(frozen=True)
class Keepable:
    """Which subsets of tokens a block can be given.

    unit: `any` (every subset), `tiles` (whole runs of `tile` consecutive tokens), `sub_grid` (a product of frames, rows
    and columns of the grid, so that what remains is a grid again; `BlockTokens.grid` must be known), `none`.
    must_keep_BN: tokens that may never be dropped (bool, batch axis 1 or B), or None.
    """

    unit: Literal["any", "tiles", "sub_grid", "none"]
    tile: int = 1
    must_keep_BN: torch.Tensor | None = None


class Anatomy(Protocol):
    """How a technique sees the transformer blocks of a denoiser; about twenty lines in a family.

    The same object serves a whole run. `args` are the positional arguments with which the unmodified diffusers
    model calls a block.
    """

    def blocks(self, denoiser: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """The main blocks in the order of the forward pass: those that may be routed and observed."""
        ...

    def extra_blocks(self, denoiser: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """Further repeated blocks (text refiners …) that are checkpointed and offloaded but never routed."""
        ...

    def width(self, denoiser: torch.nn.Module) -> int:
        """Token width D of the main blocks, for modules that read their outputs."""
        ...

    def read(self, args: tuple[Any, ...]) -> BlockTokens:
        """The token-aligned view of a call of a main block. Behind the start of a route the model hands a block the
        kept tokens together with the sides of the whole sequence, and both are returned as they are."""
        ...

    def write(self, args: tuple[Any, ...], tokens: BlockTokens, kept_BK: torch.Tensor | None) -> tuple[Any, ...]:
        """The arguments with other tokens and sides. `kept_BK` are the sorted indices that remain (None: all), for
        arguments that are neither tokens nor sides but depend on them, such as block-sparse masks. Where whole frames,
        rows and columns were dropped (`sub_grid`), `tokens.grid` is the grid of what remains, else None."""
        ...

    def keepable(self, args: tuple[Any, ...], step: Any) -> Keepable:
        """Which tokens of this call may be dropped, given the arguments and the `Step` under way."""
        ...

    def to_grid(self, tokens_BND: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        """Unrouted block tokens as (B, F, rows*columns, D) in raster order."""
        ...


# --------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SampleRequest:
    """One validation sample. Embeddings are entries of `encode_text`, on the CPU. Sizes in pixels."""

    prompt: Mapping[str, torch.Tensor]
    negative: Mapping[str, torch.Tensor]
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    seed: int
    image: Any | None = None
    """A `PIL.Image` for flavours that are conditioned on a first frame."""
    latents_only: bool = False
    """Return latents (C, F, H, W) instead of decoded media."""


class SamplingPipeline(Protocol):
    """The family's own diffusers pipeline, ready for a live denoiser."""

    def sample(self, denoiser: torch.nn.Module, request: SampleRequest) -> Any:
        """Decoded frames as a uint8 array (F, height, width, 3), or latents_CFHW where `request.latents_only`."""
        ...

    def load_adapter(self, denoiser: torch.nn.Module, path: Path) -> None:
        """Load an exported adapter through the pipeline's public loader and check that it is active."""
        ...
