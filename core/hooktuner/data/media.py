"""Reading and writing of videos (PyAV) and images (Pillow): exact in time, upright, in RGB.

Frames are chosen by presentation time, never by counting: t_i = start + i / rate, and of the frames of the file the one
whose time is nearest (the earlier one of two equally near). Times are fractions, so nothing is rounded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hooktuner.data.buckets import CropPlan
from hooktuner.files import partial_name

if TYPE_CHECKING:
    from PIL import Image

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

PREPROCESSING = 1
"""Raise this when the same file and plan give other pixels than before: it is part of every cache key."""

HD_HEIGHT = 720
"""Untagged video from this height on is taken as BT.709, as players do."""


class UnreadableError(Exception):
    """A file that cannot be decoded; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class MediaInfo:
    """What is known of a file: display size in pixels (after rotation, for square pixels), mean frames per second,
    duration in seconds, frames. An image has one frame and no rate."""

    width: int
    height: int
    frame_rate: float
    duration: float
    frames: int


# -------------------------------------------------------------------------------------------------------- videos


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream); whatever libav says about a broken file becomes `UnreadableError`."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableError("it has no video stream")
            stream = container.streams.video[0]
            # must come before the first decode; at training sizes one thread is as fast, and clips run in parallel
            stream.thread_type = "NONE"
            yield container, stream
    except FFmpegError as failure:
        raise UnreadableError(failure.strerror or str(failure)) from failure
    except (OSError, ValueError) as failure:
        raise UnreadableError(str(failure)) from failure


def probe_video(path: Path) -> MediaInfo:
    """Open `path`, decode its first frame, and count the rest by the time stamps of its packets.

    Containers are not believed: many know no number of frames, and truncated files promise too many. Files whose
    packets have no time stamps are decoded to the end.
    """
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise UnreadableError("it has no frame")
        width, height = _display_size(first, stream)
    with _opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if any(packet.pts is None for packet in packets):
            times = _decoded_times(path)
        else:
            times = sorted({packet.pts * packet.time_base for packet in packets})
        step = _step(stream)
    if not times:
        raise UnreadableError("it has no frame")
    span = times[-1] - times[0]
    rate = Fraction(len(times) - 1) / span if span > 0 else 1 / step
    return MediaInfo(width, height, float(rate), float(span + 1 / rate), len(times))


def _decoded_times(path: Path) -> list[Fraction]:
    with _opened(path) as (container, stream):
        return [time for _, time in _timed_frames(container, stream)]


def _timed_frames(container: Any, stream: Any) -> Iterator[tuple[Any, Fraction]]:
    """Decoded frames with their time in seconds after the first; frames without a stamp follow at the stream's rate."""
    step = _step(stream)
    begin: Fraction | None = None
    time = Fraction(0)
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise UnreadableError(f"the frame at {float(time):.2f} s is damaged")
        if frame.pts is not None and frame.time_base:
            stamp = frame.pts * Fraction(frame.time_base)
            begin = stamp if begin is None else begin
            time = stamp - begin
        elif begin is None:
            begin = Fraction(0)
        else:
            time += step
        yield frame, time


def _step(stream: Any) -> Fraction:
    """How long a frame is shown, by what the container says of the whole stream."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 1)


def _display_size(frame: Any, stream: Any) -> tuple[int, int]:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width = round(frame.width * aspect) if aspect > 0 else frame.width
    return (frame.height, width) if frame.rotation % 180 else (width, frame.height)


def read_clip(
    path: Path, *, frames: int, frame_rate: float | None, plan: CropPlan, start: float = 0.0
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`frames` frames of a video as RGB, uint8 (F, height, width, 3), resized and cropped by `plan`.

    frame_rate: of the result, in frames per second; None takes the file's frames one by one. start: seconds after the
    file's first frame.
    Errors: `UnreadableError` where the file is broken or ends early.
    """
    out = np.empty((frames, plan.height, plan.width, 3), np.uint8)
    with _opened(path) as (container, stream):
        resizer = _Resizer(plan)
        if frame_rate is None:
            chosen: Iterable[tuple[Any, int]] = _one_by_one(container, stream, frames, start)
        else:
            rate = Fraction(frame_rate).limit_denominator(100_000)
            grid = [Fraction(start).limit_denominator(1_000_000) + i / rate for i in range(frames)]
            chosen = _nearest(container, stream, grid)
        done = 0
        for frame, uses in chosen:
            out[done] = resizer(frame)
            out[done + 1 : done + uses] = out[done]
            done += uses
    if done < frames:
        raise UnreadableError(f"it ends after {done} of the {frames} frames that it promised")
    return out


def _one_by_one(container: Any, stream: Any, frames: int, start: float) -> Iterator[tuple[Any, int]]:
    taken = 0
    for frame, time in _timed_frames(container, stream):
        if time >= start:
            yield frame, 1
            taken += 1
        if taken == frames:
            return


def _nearest(container: Any, stream: Any, grid: list[Fraction]) -> Iterator[tuple[Any, int]]:
    """(frame, number of grid times for which it is the nearest), in order, up to the end of the grid or the file."""
    previous: tuple[Any, Fraction] | None = None
    position = seen = 0
    for frame, time in _timed_frames(container, stream):
        if previous is not None:
            uses = 0
            while position + uses < len(grid) and grid[position + uses] - previous[1] <= time - grid[position + uses]:
                uses += 1
            if uses:
                yield previous[0], uses
                position += uses
            if position == len(grid):
                return
        previous = (frame, time)
        seen += 1
    if previous is not None:  # the last frame is shown for the mean time of all, as `probe_video` counts
        last = previous[1]
        until = last + (last / (seen - 1) if last > 0 else _step(stream))
        uses = sum(1 for time in grid[position:] if time < until)
        if uses:
            yield previous[0], uses


class _Resizer:
    """Resizes, converts to RGB, turns upright and crops. One swscale context for all frames, one thread."""

    def __init__(self, plan: CropPlan) -> None:
        from av.video.reformatter import VideoReformatter

        self.plan = plan
        self.reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        from av.video.reformatter import Colorspace, Interpolation

        plan, turns = self.plan, round(frame.rotation / 90) % 4
        size = (plan.resized_width, plan.resized_height)
        width, height = size[::-1] if turns % 2 else size
        untagged = int(frame.colorspace) == 2  # AVCOL_SPC_UNSPECIFIED
        space = Colorspace.ITU709 if frame.height >= HD_HEIGHT else Colorspace.ITU601
        picture: np.ndarray[Any, Any] = self.reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=space if untagged else None,
            # Lanczos widens its window when it shrinks, so nothing aliases
            interpolation=Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT,
            threads=1,
        ).to_ndarray()
        upright = np.rot90(picture, turns)  # both count anticlockwise
        return upright[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]


def write_video(path: Path, frames_FHWC: np.ndarray[Any, Any], frame_rate: float) -> None:
    """Write uint8 RGB frames (F, height, width, 3) as H.264 in mp4 that every player opens.

    Odd sizes get one more row or column (yuv420p has none). The file appears complete or not at all.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

    frames_FHWC = np.asarray(frames_FHWC)
    if frames_FHWC.dtype != np.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[3] != 3 or not len(frames_FHWC):
        raise ValueError(f"frames must be uint8 (F, height, width, 3), not {frames_FHWC.dtype} {frames_FHWC.shape}")
    height, width = frames_FHWC.shape[1:3]
    frames_FHWC = np.pad(frames_FHWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_name(path)
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            rate = Fraction(frame_rate).limit_denominator(100_000)
            stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "medium"})
            stream.height, stream.width = frames_FHWC.shape[1:3]
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.colorspace, context.color_range = int(Colorspace.ITU709), int(ColorRange.MPEG)
            context.color_primaries, context.color_trc = int(ColorPrimaries.BT709), int(ColorTrc.BT709)
            reformatter = VideoReformatter()
            for number, picture in enumerate(frames_FHWC):
                frame = reformatter.reformat(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    dst_color_primaries=ColorPrimaries.BT709,
                    dst_color_trc=ColorTrc.BT709,
                    threads=1,
                )
                frame.pts, frame.time_base = number, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- images


def probe_image(path: Path) -> MediaInfo:
    """Decode an image whole; its size is the upright one."""
    image = open_image(path)
    return MediaInfo(image.width, image.height, 1.0, 1.0, 1)


def open_image(path: Path) -> Image.Image:
    """An image, upright and in RGB, transparency on white. Errors: `UnreadableError`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as failure:
        raise UnreadableError(str(failure)) from failure


def resize_image(image: Image.Image, plan: CropPlan) -> Image.Image:
    """Resize (Lanczos, antialiased) and crop by `plan`."""
    from PIL.Image import Resampling

    resized = image.resize((plan.resized_width, plan.resized_height), Resampling.LANCZOS)
    return resized.crop((plan.left, plan.top, plan.left + plan.width, plan.top + plan.height))


def read_image(path: Path, plan: CropPlan) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image as a clip of one frame: RGB, uint8 (1, height, width, 3)."""
    return np.asarray(resize_image(open_image(path), plan))[None].copy()


def write_image(path: Path, frame_HWC: np.ndarray[Any, Any]) -> None:
    """Write one uint8 RGB frame (height, width, 3) as PNG. The file appears complete or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_name(path)
    try:
        with temporary.open("wb") as file:
            Image.fromarray(np.asarray(frame_HWC)).save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_video(path: Path) -> bool:
    """Whether the name is that of a video file."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def probe(path: Path) -> MediaInfo:
    """What is known of a video or image. Errors: `UnreadableError`."""
    info = probe_image(path) if is_image(path) else probe_video(path)
    if info.width < 1 or info.height < 1 or not math.isfinite(info.frame_rate):
        raise UnreadableError("it has no size")
    return info
