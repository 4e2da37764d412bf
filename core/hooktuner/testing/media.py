"""Real media files, made on the spot: small `.mp4` clips and `.png` images with captions, and broken ones.

Everything is a function of the arguments: two calls write the same pixels.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

COLOURS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("red", (225, 45, 40)),
    ("blue", (45, 80, 220)),
    ("green", (40, 190, 80)),
    ("yellow", (235, 210, 50)),
    ("violet", (150, 60, 205)),
    ("white", (240, 240, 240)),
)
DIRECTIONS: tuple[tuple[str, tuple[int, int]], ...] = (
    ("right", (1, 0)),
    ("slowly down to the bottom", (0, 1)),
    ("left", (-1, 0)),
    ("up and away", (0, -1)),
)


def describe_clip(number: int) -> str:
    """The caption of clip `number`; captions differ, also in length."""
    colour = COLOURS[number % len(COLOURS)][0]
    direction = DIRECTIONS[number % len(DIRECTIONS)][0]
    tail = f", take {number}" if number >= len(COLOURS) else ""
    return f"a {colour} disc moves {direction}{tail}"


def draw_clip(number: int, *, frames: int = 9, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Clip `number` as uint8 frames (frames, height, width, 3): a coloured disc that crosses a shaded background.

    size: (width, height) in pixels.
    """
    width, height = size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    colour = np.array(COLOURS[number % len(COLOURS)][1], dtype=np.float64)
    step_x, step_y = DIRECTIONS[number % len(DIRECTIONS)][1]
    turn = 2 * math.pi * number / 7
    slope = (x / width - 0.5) * math.cos(turn) + (y / height - 0.5) * math.sin(turn)
    backdrop = (70 + 50 * slope)[..., None] * (1.2 - colour / 255)
    radius = 0.22 * min(width, height)
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for frame in range(frames):
        way = frame / max(frames - 1, 1) - 0.5
        centre_x, centre_y = width * (0.5 + 0.6 * way * step_x), height * (0.5 + 0.6 * way * step_y)
        distance = np.hypot(x - centre_x, y - centre_y)
        inside = np.clip(radius - distance + 0.5, 0, 1)[..., None]
        clip[frame] = np.clip(backdrop * (1 - inside) + colour * inside, 0, 255).round().astype(np.uint8)
    return clip


def write_video(path: Path, frames_FHWC: np.ndarray, *, rate: float = 8.0) -> Path:
    """Write uint8 frames as H.264 in any container that PyAV knows by the name's ending. Even sizes only."""
    import av

    count, height, width, _ = frames_FHWC.shape
    if height % 2 or width % 2:
        raise ValueError(f"{width}x{height} pixels cannot be written as yuv420p: both must be even")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": "8", "preset": "ultrafast"}
        for image in frames_FHWC[:count]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    return path


def make_clips(
    folder: Path,
    *,
    count: int = 2,
    frames: int = 9,
    size: tuple[int, int] = (64, 64),
    rate: float = 8.0,
    captions: bool = True,
    suffix: str = ".mp4",
) -> list[Path]:
    """Write `clip-0.mp4` … with same-named `.txt` captions, and return the paths of the clips.

    size: (width, height) in pixels, both even. rate: frames per second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"clip-{number}{suffix}"
        paths.append(write_video(path, draw_clip(number, frames=frames, size=size), rate=rate))
        if captions:
            path.with_suffix(".txt").write_text(describe_clip(number) + "\n", encoding="utf-8")
    return paths


def make_images(folder: Path, *, count: int = 2, size: tuple[int, int] = (64, 64), captions: bool = True) -> list[Path]:
    """Write `image-0.png` … with same-named `.txt` captions, and return the paths of the images."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"image-{number}.png"
        Image.fromarray(draw_clip(number, frames=1, size=size)[0]).save(path)
        if captions:
            path.with_suffix(".txt").write_text(describe_clip(number) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def broken_clip(path: Path) -> Path:
    """Write a file that looks like a video and cannot be decoded: a real clip whose second half is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, draw_clip(0))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path
