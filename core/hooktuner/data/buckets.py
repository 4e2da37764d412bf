"""Which size, crop and length a clip gets. Pure functions: no files, no torch, no randomness of their own.

A bucket is one shape, `WxH@F`: every micro-batch comes from one. Frame counts are at the frame rate of training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hooktuner.family import FrameRule

TOLERANCE = 0.1
"""Part of a frame's duration that timestamps may be off, as those of containers that count milliseconds are."""


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape of clips: pixels and frames."""

    width: int
    height: int
    frames: int

    @property
    def key(self) -> str:
        """`832x480@61`."""
        return f"{self.width}x{self.height}@{self.frames}"


@dataclass(frozen=True)
class CropPlan:
    """Resize to `resized_width` x `resized_height`, then cut `width` x `height` at (`left`, `top`)."""

    resized_width: int
    resized_height: int
    left: int
    top: int
    width: int
    height: int


def target_size(
    width: int,
    height: int,
    *,
    resolution: float,
    resolution_type: Literal["pixel", "area", "pixel_area"],
    multiple: int,
    square: bool = False,
) -> tuple[int, int]:
    """(width, height) of the training clip, multiples of `multiple` nearest to the wanted size.

    resolution_type: `pixel` = `resolution` is the shorter edge in pixels; `area` = megapixels; `pixel_area` = the edge
    of a square of the same area. The aspect ratio is that of the file, or 1 where `square`.
    """
    aspect = 1.0 if square else width / height
    if resolution_type == "pixel":
        wide, high = (resolution * aspect, resolution) if aspect >= 1 else (resolution, resolution / aspect)
    else:
        area = resolution * 1e6 if resolution_type == "area" else resolution**2
        wide, high = math.sqrt(area * aspect), math.sqrt(area / aspect)
    return _align(wide, multiple), _align(high, multiple)


def _align(value: float, multiple: int) -> int:
    return max(1, math.floor(value / multiple + 0.5)) * multiple


def crop_plan(
    width: int,
    height: int,
    target: tuple[int, int],
    *,
    style: Literal["center", "random", "corner"] = "center",
    draw: tuple[float, float] = (0.5, 0.5),
) -> CropPlan:
    """Resize a `width` x `height` picture to cover `target` with its aspect ratio kept, then crop what sticks out.

    draw: two numbers in [0, 1) that place a `random` crop; other styles ignore them.
    """
    scale = max(target[0] / width, target[1] / height)
    resized_width, resized_height = max(target[0], round(width * scale)), max(target[1], round(height * scale))
    spare = (resized_width - target[0], resized_height - target[1])
    if style == "corner":
        left, top = 0, 0
    elif style == "center":
        left, top = spare[0] // 2, spare[1] // 2
    else:
        left, top = int(draw[0] * (spare[0] + 1)), int(draw[1] * (spare[1] + 1))
    return CropPlan(resized_width, resized_height, left, top, *target)


def frames_at_rate(duration: float, source_rate: float, rate: float) -> int:
    """How many frames a clip of `duration` seconds has on the grid 0, 1/rate, 2/rate …

    Every grid time at which the clip still shows something counts, within `TOLERANCE` of a frame.
    """
    return max(0, math.ceil((duration - TOLERANCE / max(source_rate, rate)) * rate))


@dataclass(frozen=True)
class Refusal:
    """Why a clip is not trained. `category` groups reasons in reports; `detail` is about this clip."""

    category: str
    detail: str


def choose_frames(
    available: int,
    *,
    rule: FrameRule,
    num_frames: int | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    frame_interval: int | None = None,
) -> int | Refusal:
    """How many frames of a clip with `available` are trained, or why none.

    With `num_frames`, that many: shorter clips are too short, and clips longer than `max_frames` too long. Without
    it, the clip's own length, cut to `max_frames`, rounded down to `frame_interval` and then to the model's rule.
    """
    need = max(min_frames or 1, num_frames or 1)
    if available < need:
        return Refusal(f"too short (fewer than {need} frames)", f"{available} frames")
    if num_frames is not None:
        if max_frames is not None and available > max_frames:
            return Refusal(f"too long (more than {max_frames} frames)", f"{available} frames")
        return num_frames
    frames = min(available, max_frames) if max_frames else available
    if frame_interval:
        frames = frames // frame_interval * frame_interval
        if frames == 0:
            return Refusal(f"too short (fewer than frame_interval = {frame_interval} frames)", f"{available} frames")
    return rule.floor(frames)
