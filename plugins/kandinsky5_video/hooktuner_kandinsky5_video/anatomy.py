"""How techniques see the denoiser's blocks.

diffusers calls a visual block as `block(tokens_BND, text_BLD, time_BD, rope, sparse_params)` and a text block as
`block(text_BLD, time_BD, rope)`. Tokens are in raster order (frame, row, column) with dense attention; with NABLA
each frame is cut into tiles of 8 x 8 tokens that follow each other, 64 tokens a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_kandinsky import fractal_unflatten
from hooktuner.errors import ModelError
from hooktuner.family import BlockTokens, Grid, Keepable

from hooktuner_kandinsky5_video.attention import unwrapped
from hooktuner_kandinsky5_video.geometry import NABLA_TILE
from hooktuner_kandinsky5_video.predict import take

TILE_TOKENS = NABLA_TILE**2


class Kandinsky5Anatomy:
    """The `Anatomy` of `Kandinsky5Transformer3DModel`."""

    def blocks(self, denoiser: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """The visual blocks."""
        return list(unwrapped(denoiser).visual_transformer_blocks)

    def extra_blocks(self, denoiser: torch.nn.Module) -> Sequence[torch.nn.Module]:
        """The text refiner's blocks; they are never routed."""
        return list(unwrapped(denoiser).text_transformer_blocks)

    def width(self, denoiser: torch.nn.Module) -> int:
        """The model's width: 1792 for Lite, 4096 for Pro."""
        return unwrapped(denoiser).config.model_dim

    def read(self, args: tuple[Any, ...]) -> BlockTokens:
        """Tokens, and the rotary table (B, N, 1, head/2, 2, 2) that goes with them token by token."""
        tokens_BND, _, _, rope, _ = args
        return BlockTokens(tokens_BND, ((rope, 1),), _grid(args))

    def write(self, args: tuple[Any, ...], tokens: BlockTokens, kept_BK: torch.Tensor | None) -> tuple[Any, ...]:
        """The call with other tokens. With NABLA the mask of tiles shrinks with the tiles, per sample."""
        _, text_BLD, time_BD, _, sparse = args
        if sparse is not None and kept_BK is not None:
            sparse = {**sparse, "sta_mask": _kept_tiles(sparse["sta_mask"], kept_BK), "visual_shape": None}
        return tokens.tokens_BND, text_BLD, time_BD, tokens.sides[0][0], sparse

    def keepable(self, args: tuple[Any, ...], step: Any) -> Keepable:
        """Any subset of tokens; with NABLA whole tiles. A given first frame is never dropped."""
        must_keep_BN = self._given_tokens(args, step)
        if args[4] is not None:
            return Keepable("tiles", TILE_TOKENS, must_keep_BN)
        return Keepable("any", 1, must_keep_BN)

    def to_grid(self, tokens_BND: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        """(B, F, rows·columns, D) in raster order, the order of tiles undone."""
        grid = _grid(args)
        if grid is None:
            raise ModelError(
                "kandinsky5-video — the token grid of a routed block call is not known. Observe blocks outside routed "
                "stretches, or put the dropped tokens back first."
            )
        shape = (tokens_BND.shape[0], grid.frames, grid.rows, grid.columns)
        grid_BFRCD = fractal_unflatten(tokens_BND, shape, block_mask=args[4] is not None)
        return grid_BFRCD.reshape(shape[0], grid.frames, grid.rows * grid.columns, -1)

    @staticmethod
    def _given_tokens(args: tuple[Any, ...], step: Any) -> torch.Tensor | None:
        """Tokens of a given first frame (b, N), or None. Both token orders put frame 0 first."""
        grid = _grid(args)
        if step.conditioning is None or grid is None:
            return None
        given_B = step.conditioning.given_B1FHW[:, 0, 0, 0, 0]
        rows = step.rows
        if rows is not None and len(rows) < len(given_B):
            given_B = take(given_B, rows)
        tokens = args[0].shape[1]
        first_N = torch.arange(tokens, device=args[0].device) < grid.rows * grid.columns
        return given_B[:, None] & first_N[None, :]


def _grid(args: tuple[Any, ...]) -> Grid | None:
    """The token grid of an unrouted call, or None.

    With NABLA it stands in the sparse parameters. Otherwise the rotary table tells: diffusers computes it as
    (B, F, rows, columns, …) and hands the blocks a flattened view of that tensor.
    """
    tokens_BND, _, _, rope, sparse = args
    shape = None
    if sparse is not None:
        shape = sparse["visual_shape"]
    elif rope._base is not None and rope._base.ndim == 6:
        shape = rope._base.shape[1:4]
    if shape is None:
        return None
    grid = Grid(*(int(size) for size in shape))
    return grid if grid.frames * grid.rows * grid.columns == tokens_BND.shape[1] else None


def _kept_tiles(mask_B1TT: torch.Tensor, kept_BK: torch.Tensor) -> torch.Tensor:
    """The tile mask (1 or B, 1, T, T) for the kept tiles of each sample: (B, 1, t, t)."""
    tiles_Bt = kept_BK[:, ::TILE_TOKENS] // TILE_TOKENS
    batch, count = tiles_Bt.shape
    mask_BTT = mask_B1TT[:, 0].expand(batch, -1, -1)
    rows_BtT = mask_BTT.gather(1, tiles_Bt[:, :, None].expand(-1, -1, mask_BTT.shape[2]))
    return rows_BtT.gather(2, tiles_Bt[:, None, :].expand(-1, count, -1))[:, None]
