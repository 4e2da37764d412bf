from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from hooktuner.data.buckets import crop_plan, frames_at_rate
from hooktuner.data.media import (
    MediaInfo,
    UnreadableError,
    open_image,
    probe,
    read_clip,
    read_image,
    write_image,
    write_video,
)
from PIL import Image

WHOLE = crop_plan(64, 48, (64, 48))


def test_probe_tells_size_rate_duration_and_frames(tmp_path, make_clip):
    info = probe(make_clip(tmp_path / "a.mp4"))
    assert info == MediaInfo(64, 48, pytest.approx(24), pytest.approx(1.0), 24)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
def test_containers_that_do_not_know_their_frames_are_counted(tmp_path, make_clip, suffix, numbers):
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(suffix, "libx264")
    path = make_clip(tmp_path / f"a{suffix}", codec=codec, bitrate=4_000_000)
    info = probe(path)
    assert (info.width, info.height, info.frames) == (64, 48, 24)
    assert frames_at_rate(info.duration, info.frame_rate, 24) == 24
    clip = read_clip(path, frames=24, frame_rate=24, plan=WHOLE)
    assert numbers(clip) == list(range(24))


def test_a_program_stream_is_counted(tmp_path, make_clip):
    path = make_clip(tmp_path / "a.mpg", codec="mpeg2video", bitrate=4_000_000)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0  # what makes counting necessary
    assert probe(path).frames == 24


@pytest.mark.parametrize("rate", [8, 12, 15, 16, 24, 30, 48, 60])
@pytest.mark.parametrize("source", [24, 25, 30, Fraction(30000, 1001)])
def test_resampling_takes_the_nearest_frame(tmp_path, make_clip, numbers, source, rate):
    path = make_clip(tmp_path / "a.mp4", rate=source)
    info = probe(path)
    count = frames_at_rate(info.duration, info.frame_rate, rate)
    # independently: for each grid time the frame with the least distance, the earlier one of two
    times = [Fraction(k) / Fraction(source) for k in range(24)]
    expected = [min(range(24), key=lambda k: (abs(times[k] - Fraction(i, rate)), k)) for i in range(count)]
    assert numbers(read_clip(path, frames=count, frame_rate=rate, plan=WHOLE)) == expected


def test_start_is_seconds_into_the_file(tmp_path, make_clip, numbers):
    path = make_clip(tmp_path / "a.mp4")
    assert numbers(read_clip(path, frames=3, frame_rate=12, plan=WHOLE, start=0.5)) == [12, 14, 16]
    assert numbers(read_clip(path, frames=3, frame_rate=None, plan=WHOLE, start=0.5)) == [12, 13, 14]


def test_uneven_frame_times_are_respected(tmp_path, numbers):
    path = tmp_path / "uneven.mkv"
    stamps = [0, 100, 200, 250, 300, 700, 1000]  # milliseconds
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 16 + 8 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_clip(path, frames=6, frame_rate=5, plan=WHOLE)  # 0, 200, 400, 600, 800, 1000 ms
    assert numbers(clip) == [0, 2, 4, 5, 5, 6]


def test_a_clip_that_ends_early_is_refused(tmp_path, make_clip):
    path = make_clip(tmp_path / "a.mp4")
    with pytest.raises(UnreadableError, match="it ends after 24 of the 30 frames that it promised"):
        read_clip(path, frames=30, frame_rate=24, plan=WHOLE)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\0" * 5000])
def test_a_broken_file_says_why(tmp_path, content):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"\w"):
        probe(path)


def test_a_truncated_file_is_not_believed(tmp_path, make_clip):
    whole = make_clip(tmp_path / "whole.mkv", frames=28, size=(256, 256))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    try:
        info = probe(cut)
    except UnreadableError:
        return
    assert info.frames < 28


def test_a_sound_file_has_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UnreadableError, match="it has no video stream"):
        probe(path)


def left_bright(size=(64, 48)):
    """A picture whose left half is bright, so that turning and cropping can be seen."""
    picture = np.full((size[1], size[0], 3), 40, np.uint8)
    picture[:, : size[0] // 2] = 200
    return picture


def test_rotated_video_is_upright(tmp_path):
    straight, turned = tmp_path / "a.mp4", tmp_path / "turned.mp4"
    write_video(straight, np.stack([left_bright()] * 5), 24)
    data = bytearray(straight.read_bytes())
    # the display matrix in the track header says how players turn the picture: here 90 degrees clockwise
    at = data.index(b"tkhd") + 4 + 40
    one, minus_one = (0x10000).to_bytes(4, "big"), (-0x10000).to_bytes(4, "big", signed=True)
    zero, unit = bytes(4), (0x40000000).to_bytes(4, "big")
    data[at : at + 36] = b"".join([zero, one, zero, minus_one, zero, zero, (48 << 16).to_bytes(4, "big"), zero, unit])
    turned.write_bytes(data)
    info = probe(turned)
    assert (info.width, info.height) == (48, 64)
    clip = read_clip(turned, frames=2, frame_rate=24, plan=crop_plan(48, 64, (48, 64)))
    assert clip.shape == (2, 64, 48, 3)
    assert clip[:, :28].mean() > 190  # what was left is now up
    assert clip[:, 36:].mean() < 50


def test_crop_takes_the_planned_part(tmp_path):
    write_video(tmp_path / "a.mp4", np.stack([left_bright()] * 3), 24)
    left = read_clip(tmp_path / "a.mp4", frames=1, frame_rate=24, plan=crop_plan(64, 48, (32, 48), style="corner"))
    right = read_clip(
        tmp_path / "a.mp4", frames=1, frame_rate=24, plan=crop_plan(64, 48, (32, 48), style="random", draw=(0.999, 0))
    )
    assert left[..., :30, :].mean() > 190
    assert right[..., 2:, :].mean() < 50


def test_shrinking_does_not_alias(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the small picture can show: must become grey
    write_video(tmp_path / "a.mp4", np.stack([stripes] * 2), 24)
    small = read_clip(tmp_path / "a.mp4", frames=1, frame_rate=24, plan=crop_plan(128, 128, (32, 32)))
    assert small.std() < 8
    assert abs(small.mean() - 128) < 12


def test_colours_survive_writing_and_reading(tmp_path):
    colours = np.zeros((3, 64, 64, 3), np.uint8)
    colours[:] = [[[[200, 40, 90]]], [[[30, 180, 60]]], [[[50, 60, 220]]]]
    write_video(tmp_path / "a.mp4", colours, 24)
    back = read_clip(tmp_path / "a.mp4", frames=3, frame_rate=24, plan=crop_plan(64, 64, (64, 64)))
    assert np.abs(back.astype(int) - colours).max() <= 4


def test_untagged_colours_follow_the_size_as_in_players(tmp_path):
    def red_of(size, name):
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=24)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            y, u, v = (np.full(size[::-1], 63, np.uint8), np.full((size[1] // 2, size[0] // 2), 102, np.uint8),
                       np.full((size[1] // 2, size[0] // 2), 240, np.uint8))  # fmt: skip
            planes = np.concatenate([y.reshape(-1), u.reshape(-1), v.reshape(-1)]).reshape(size[1] * 3 // 2, size[0])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
            container.mux(stream.encode())
        return read_clip(path, frames=1, frame_rate=24, plan=crop_plan(*size, (64, 64)))[0].mean(axis=(0, 1))

    assert red_of((64, 48), "small.mp4")[1] < 12  # BT.601: green 63/102/240 is near 5 … pure BT.709 red at HD
    assert red_of((1280, 720), "hd.mp4") == pytest.approx([255, 0, 0], abs=6)


def test_odd_sizes_can_be_written(tmp_path):
    path = tmp_path / "odd.mp4"
    write_video(path, np.full((3, 47, 63, 3), 120, np.uint8), 23.976)
    info = probe(path)
    assert (info.width, info.height, info.frames) == (64, 48, 3)
    assert info.frame_rate == pytest.approx(23.976, abs=1e-3)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert [file.name for file in tmp_path.iterdir()] == ["odd.mp4"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="uint8"):
        write_video(path, np.zeros((3, 8, 8, 3), np.float32), 24)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_images_are_upright_and_on_white(tmp_path):
    picture = Image.fromarray(left_bright())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to display
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert probe(tmp_path / "a.jpg") == MediaInfo(48, 64, 1.0, 1.0, 1)
    turned = read_image(tmp_path / "a.jpg", crop_plan(48, 64, (48, 64)))
    assert turned.shape == (1, 64, 48, 3)
    assert turned[:, :28].mean() > 180
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableError):
        probe(tmp_path / "bad.png")


def test_write_image(tmp_path):
    write_image(tmp_path / "new" / "a.png", left_bright())
    assert np.array_equal(np.asarray(open_image(tmp_path / "new" / "a.png")), left_bright())
