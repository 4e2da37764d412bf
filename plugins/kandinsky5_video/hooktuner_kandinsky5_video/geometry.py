"""Facts about sizes that need no torch: positions, rope scale, and where sparse attention applies."""

from __future__ import annotations

FRAME_STRIDE = 4
"""Pixel frames per latent frame, after the first (HunyuanVideo VAE)."""
SPATIAL_STRIDE = 8
"""Pixels per latent cell (HunyuanVideo VAE)."""
PATCH = 2
"""Latent cells per token edge."""
SIZE_MULTIPLE = SPATIAL_STRIDE * PATCH
"""Height and width in pixels are multiples of this."""
NABLA_TILE = 8
"""Edge, in tokens, of the tiles that NABLA keeps or skips as a whole."""
NABLA_SIZE_MULTIPLE = SIZE_MULTIPLE * NABLA_TILE
"""With NABLA, height and width in pixels are multiples of this."""
POSITIONS = 128
"""Rotary positions per axis in the denoiser: the most latent frames, token rows and token columns."""
MAX_EDGE = POSITIONS * SIZE_MULTIPLE
"""The longest edge in pixels."""
MAX_FRAMES = (POSITIONS - 1) * FRAME_STRIDE + 1
"""The longest clip in pixel frames."""
I2V_MIN_FRAMES = 4 * FRAME_STRIDE + 1
"""The diffusers image-to-video pipeline renormalises the first four latent frames by the statistics of those that
follow, so a shorter video comes out as NaN."""
SD_MIN_EDGE, SD_MAX_EDGE = 480, 854
"""Edges of the authors' standard definition, in pixels."""
SD_MAX_LATENT_FRAMES = 31
"""Latent frames of the authors' 5 s clips (121 frames at 24 per second)."""

RopeScale = tuple[float, float, float]
SD_ROPE: RopeScale = (1, 2, 2)
HD_ROPE: RopeScale = (1, 3.16, 3.16)


def rope_scale(rule: str, height: int, width: int) -> RopeScale:
    """Divisors of the (frame, row, column) positions for a clip of `height` x `width` pixels.

    rule: `sd`, `hd`, `pipeline` (`Kandinsky5T2VPipeline._get_scale_factor`: SD when both edges lie in 480–854, else
    HD) or `auto` (SD up to 854 pixels). The rules differ below 480 pixels, where the pipeline would take HD's
    positions, which no checkpoint saw at that size.
    """
    if rule in ("sd", "hd"):
        return SD_ROPE if rule == "sd" else HD_ROPE
    lowest = SD_MIN_EDGE if rule == "pipeline" else 0
    return SD_ROPE if lowest <= min(height, width) and max(height, width) <= SD_MAX_EDGE else HD_ROPE


def wants_nabla(choice: str, checkpoint: str, latent_frames: int, height: int, width: int) -> bool:
    """Whether a clip is attended sparsely. `choice` is the option `sparse_attention`, `checkpoint` the
    `attention_type` of the denoiser's config (`regular` or `nabla`), sizes are in pixels.

    The authors run the same weights densely on 5 s clips of standard definition, and with NABLA beyond.
    """
    if checkpoint != "nabla" or choice == "dense":
        return False
    return choice == "nabla" or latent_frames > SD_MAX_LATENT_FRAMES or max(height, width) > SD_MAX_EDGE
