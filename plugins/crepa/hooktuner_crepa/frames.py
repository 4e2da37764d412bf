"""Which pixel frames a latent frame stands for.

A causal video VAE of temporal stride s encodes the first pixel frame alone and then groups of s: latent frame 0 is
pixel frame 0, latent frame k is the pixel frames s·(k−1)+1 … s·k, and a clip of s·(F−1)+1 frames gives F latent frames.
"""

from __future__ import annotations

from typing import Literal

FrameMap = Literal["center", "last", "mean"]


def source_frames(frame_map: FrameMap, pixel_frames: int, latent_frames: int, stride: int) -> list[list[int]]:
    """For each latent frame the pixel frames whose features are averaged; one frame unless `frame_map` is `mean`.

    center: s·k − ⌊(s−1)/2⌋, the middle of the group (the later of two: for s = 4, the third of the group).
    last: s·k. Errors: `ValueError` where the numbers of frames do not fit.
    """
    if pixel_frames != stride * (latent_frames - 1) + 1:
        raise ValueError(
            f"{pixel_frames} frames do not give {latent_frames} latent frames with one latent frame per {stride}"
        )
    groups = [[0]]
    for k in range(1, latent_frames):
        last = stride * k
        if frame_map == "mean":
            groups.append(list(range(last - stride + 1, last + 1)))
        else:
            groups.append([last if frame_map == "last" else last - (stride - 1) // 2])
    return groups
