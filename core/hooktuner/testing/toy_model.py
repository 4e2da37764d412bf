"""The toy denoiser: a small video diffusion transformer that behaves like those of diffusers.

About 0.3 million parameters, and everything a technique meets in a real model: patches of (1, 2, 2) latents, rotary
positions over frames, rows and columns as a side tensor that every block is given, text cross-attention with a mask,
AdaLN modulation (not zero-initialised, so gradients reach everything), block calls through the checkpointing
function, `save_pretrained` / `from_pretrained`, LoRA adapters. Shape suffixes: see `hooktuner.family`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from hooktuner.family import BlockTokens, Grid, Keepable

PATCH = 2
"""Latent rows and columns of one token."""


class ToyAttention(nn.Module):
    """Multi-head attention with optional rotary positions and an optional mask over keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def forward(
        self, x_BND: Tensor, context_BLD: Tensor, rope: Tensor | None = None, mask_BL: Tensor | None = None
    ) -> Tensor:
        """Attend from `x_BND` to `context_BLD`. rope: see `rotary_table`. mask_BL: True where a key is real."""
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.to_q, x_BND), (self.to_k, context_BLD), (self.to_v, context_BLD))
        )
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class ToyFeedForward(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return self.down(F.gelu(self.up(x)))


class ToyTextBlock(nn.Module):
    """An extra block that refines text tokens; it is checkpointed and offloaded, never routed."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = ToyAttention(width, heads)
        self.feed_forward = ToyFeedForward(width, 2 * width)

    def forward(self, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """mask_BL: True where a token is real."""
        normal = _norm(text_BLD)
        text_BLD = text_BLD + self.attention(normal, normal, mask_BL=mask_BL)
        return text_BLD + self.feed_forward(_norm(text_BLD))


class ToyBlock(nn.Module):
    """A main block: self-attention, cross-attention to text, feed-forward, each modulated by the timestep."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 9 * width)
        self.attention = ToyAttention(width, heads)
        self.cross_attention = ToyAttention(width, heads)
        self.feed_forward = ToyFeedForward(width, 2 * width)

    def forward(self, tokens_BND: Tensor, text_BLD: Tensor, time_BD: Tensor, rope: Tensor, mask_BL: Tensor) -> Tensor:
        """rope: `rotary_table`'s, or flat: (1 or B, N, 2, head_width / 2)."""
        parts = self.modulation(F.silu(time_BD))[:, None].chunk(9, dim=-1)
        shift, scale, gate = parts[0::3], parts[1::3], parts[2::3]
        x = _norm(tokens_BND) * (1 + scale[0]) + shift[0]
        tokens_BND = tokens_BND + (1 + gate[0]) * self.attention(x, x, rope=rope)
        x = _norm(tokens_BND) * (1 + scale[1]) + shift[1]
        tokens_BND = tokens_BND + (1 + gate[1]) * self.cross_attention(x, text_BLD, mask_BL=mask_BL)
        x = _norm(tokens_BND) * (1 + scale[2]) + shift[2]
        return tokens_BND + (1 + gate[2]) * self.feed_forward(x)


class ToyDenoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The denoiser: noised latents, timestep and text → velocity.

    One input channel besides the latents says which latents are given (1) and which are to be generated (0).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ToyBlock", "ToyTextBlock"]  # noqa: RUF012  diffusers wants a list
    _repeated_blocks = ["ToyBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        channels: int = 8,
        width: int = 64,
        heads: int = 4,
        num_layers: int = 4,
        num_text_layers: int = 1,
        text_width: int = 32,
    ) -> None:
        super().__init__()
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)
        self.text_in = nn.Linear(text_width, width)
        self.patch_in = nn.Linear((channels + 1) * PATCH * PATCH, width)
        self.text_blocks = nn.ModuleList([ToyTextBlock(width, heads) for _ in range(num_text_layers)])
        self.blocks = nn.ModuleList([ToyBlock(width, heads) for _ in range(num_layers)])
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, channels * PATCH * PATCH)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        given_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of `hidden_states`.

        hidden_states (B, C, F, H, W), H and W even. timestep (B,) in 0 … 1000. encoder_hidden_states
        (B, L, text_width). encoder_attention_mask (B, L), True for real tokens; None: all are. given_mask
        (B, 1, F, H, W), True where latents are given; None: nowhere.
        """
        dtype = self.patch_in.weight.dtype
        batch, _, frames, height, width = hidden_states.shape
        if given_mask is None:
            given_mask = hidden_states.new_zeros((batch, 1, frames, height, width))
        if encoder_attention_mask is None:
            encoder_attention_mask = encoder_hidden_states.new_ones(encoder_hidden_states.shape[:2], dtype=torch.bool)
        rows, columns = height // PATCH, width // PATCH

        time_BD = self.time_out(F.silu(self.time_in(sinusoid(timestep, self.time_in.in_features).to(dtype))))
        text_BLD = self.text_in(encoder_hidden_states.to(dtype))
        patches = to_patches(torch.cat([hidden_states.to(dtype), given_mask.to(dtype)], dim=1))
        tokens_BND = self.patch_in(patches)
        head_width = self.patch_in.out_features // self.config["heads"]
        rope = rotary_table(Grid(frames, rows, columns), head_width, hidden_states.device)

        for block in self.text_blocks:
            text_BLD = self._call(block, text_BLD, encoder_attention_mask)
        for block in self.blocks:
            tokens_BND = self._call(block, tokens_BND, text_BLD, time_BD, rope, encoder_attention_mask)

        shift, scale = self.modulation_out(F.silu(time_BD))[:, None].chunk(2, dim=-1)
        patches = self.patch_out(_norm(tokens_BND) * (1 + scale) + shift)
        sample = from_patches(patches, Grid(frames, rows, columns))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _call(self, block: nn.Module, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            assert self._gradient_checkpointing_func is not None
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)


class ToyAnatomy:
    """The `Anatomy` of `ToyDenoiser`. Block arguments: tokens, text, time, rope, text mask.

    The model's rotary table has the shape of the grid; techniques see it flat, one entry per token.
    """

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The main blocks."""
        return list(denoiser.blocks)  # type: ignore[arg-type]

    def extra_blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The text blocks."""
        return list(denoiser.text_blocks)  # type: ignore[arg-type]

    def width(self, denoiser: nn.Module) -> int:
        """Width of a token."""
        return denoiser.patch_in.out_features  # type: ignore[union-attr, return-value]

    def read(self, args: tuple[Any, ...]) -> BlockTokens:
        """Tokens, and the rotary table beside them."""
        return BlockTokens(args[0], ((flat_rope(args[3]), 1),), grid_of(args[3]))

    def write(self, args: tuple[Any, ...], tokens: BlockTokens, kept_BK: Tensor | None) -> tuple[Any, ...]:
        """The arguments with other tokens and another table."""
        _, text_BLD, time_BD, old_rope, mask_BL = args
        rope = tokens.sides[0][0]
        grid = grid_of(old_rope)
        if kept_BK is None and grid is not None:
            rope = rope.unflatten(1, (grid.frames, grid.rows, grid.columns))
        return (tokens.tokens_BND, text_BLD, time_BD, rope, mask_BL)

    def keepable(self, args: tuple[Any, ...], step: Any) -> Keepable:
        """Any subset; tokens of given frames must stay."""
        grid = grid_of(args[3])
        if step.conditioning is None or grid is None:
            return Keepable("any")
        given = step.conditioning.given_B1FHW
        given = given.expand(given.shape[0], 1, grid.frames, grid.rows * PATCH, grid.columns * PATCH)
        return Keepable("any", must_keep_BN=given[..., ::PATCH, ::PATCH].flatten(1))

    def to_grid(self, tokens_BND: Tensor, args: tuple[Any, ...]) -> Tensor:
        """(B, F, rows*columns, D)."""
        grid = grid_of(args[3])
        assert grid is not None, "the tokens of a routed call have no grid"
        return tokens_BND.unflatten(1, (grid.frames, grid.rows * grid.columns))


# ------------------------------------------------------------------------------------------------------ functions


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def sinusoid(timestep_B: Tensor, width: int) -> Tensor:
    """Sinusoidal features (B, width) of timesteps in 0 … 1000, float32."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep_B.device).float() / half)
    angles = timestep_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def to_patches(x_BCFHW: Tensor) -> Tensor:
    """(B, N, C·PATCH·PATCH): patches of (1, PATCH, PATCH) in raster order."""
    x = x_BCFHW.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # B C F R p W p
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def from_patches(patches_BNP: Tensor, grid: Grid) -> Tensor:
    """The inverse of `to_patches`: (B, C, F, H, W)."""
    x = patches_BNP.unflatten(1, (grid.frames, grid.rows, grid.columns)).unflatten(-1, (-1, PATCH, PATCH))
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def rotary_table(grid: Grid, head_width: int, device: torch.device) -> Tensor:
    """Cosines and sines (1, F, R, C, 2, head_width / 2), float32: a quarter of the pairs turns with the frame, the
    rest with row and column."""
    pairs = head_width // 2
    for_frames = pairs // 4
    for_rows = (pairs - for_frames) // 2
    shares = (for_frames, for_rows, pairs - for_frames - for_rows)
    angles = []
    for axis, (size, share) in enumerate(zip((grid.frames, grid.rows, grid.columns), shares, strict=True)):
        frequencies = 100.0 ** (-torch.arange(share, device=device).float() / max(share, 1))
        angle = torch.arange(size, device=device).float()[:, None] * frequencies
        shape = [1, 1, 1, share]
        shape[axis] = size
        angles.append(angle.reshape(shape).expand(grid.frames, grid.rows, grid.columns, share))
    table = torch.cat(angles, dim=-1)
    return torch.stack([table.cos(), table.sin()], dim=-2)[None]


def flat_rope(rope: Tensor) -> Tensor:
    """The table with one token axis: (1 or B, N, 2, head_width / 2)."""
    return rope.flatten(1, 3) if rope.ndim == 6 else rope


def grid_of(rope: Tensor) -> Grid | None:
    """The token grid of a table that was not routed."""
    return Grid(*rope.shape[1:4]) if rope.ndim == 6 else None


def rotate(heads_BhNE: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs of features by their positions, in float32."""
    cos, sin = flat_rope(rope)[:, None].unbind(dim=-2)
    even, odd = heads_BhNE.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(heads_BhNE.dtype)
