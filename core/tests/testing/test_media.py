"""The harness writes real media: decodable, as announced, each clip its own, twice the same."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from hooktuner.testing import broken_clip, describe_clip, draw_clip, make_clips, make_images, write_video
from PIL import Image


def _decode(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(rate)


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_clips_are_what_was_drawn(suffix: str, tmp_path: Path) -> None:
    paths = make_clips(tmp_path, count=2, frames=13, size=(48, 32), rate=12.5, suffix=suffix)
    assert [path.name for path in paths] == [f"clip-0{suffix}", f"clip-1{suffix}"]
    for number, path in enumerate(paths):
        frames, rate = _decode(path)
        assert frames.shape == (13, 32, 48, 3)
        assert rate == 12.5
        wanted = draw_clip(number, frames=13, size=(48, 32)).astype(float)
        assert np.abs(frames - wanted).mean() < 8, "the file does not show what was drawn"
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == describe_clip(number) + "\n"


def test_clips_move_and_differ(tmp_path: Path) -> None:
    clips = [draw_clip(number).astype(float) for number in range(4)]
    for position, clip in enumerate(clips):
        assert np.abs(clip[0] - clip[-1]).max() > 50, "nothing moves"
        assert all(np.abs(clip - other).mean() > 5 for other in clips[position + 1 :]), "two clips look the same"
    captions = [describe_clip(number) for number in range(24)]
    assert len(set(captions)) == 24
    assert len({len(caption.split()) for caption in captions[:4]}) > 1, "captions should have unequal lengths"


def test_two_calls_write_the_same_pixels(tmp_path: Path) -> None:
    one, two = make_clips(tmp_path / "one", count=1), make_clips(tmp_path / "two", count=1)
    assert np.array_equal(_decode(one[0])[0], _decode(two[0])[0])


def test_captions_can_be_left_out_and_odd_sizes_are_refused(tmp_path: Path) -> None:
    make_clips(tmp_path, count=1, captions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["clip-0.mp4"]
    with pytest.raises(ValueError, match="31x32 pixels cannot be written"):
        write_video(tmp_path / "odd.mp4", draw_clip(0, size=(31, 32)))


def test_images(tmp_path: Path) -> None:
    for number, path in enumerate(make_images(tmp_path, count=2, size=(40, 24))):
        assert np.array_equal(np.array(Image.open(path)), draw_clip(number, frames=1, size=(40, 24))[0])
        assert path.with_suffix(".txt").read_text(encoding="utf-8").strip() == describe_clip(number)


def test_a_broken_clip_cannot_be_decoded(tmp_path: Path) -> None:
    path = broken_clip(tmp_path / "deep" / "broken.mp4")
    assert path.stat().st_size > 500
    with pytest.raises(av.FFmpegError):
        _decode(path)
