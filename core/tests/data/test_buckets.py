from __future__ import annotations

from fractions import Fraction

import pytest
from hooktuner.data.buckets import Bucket, Refusal, choose_frames, crop_plan, frames_at_rate, target_size
from hooktuner.family import FrameRule
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(16, 4000)
kinds = st.sampled_from(["pixel", "pixel_area"])


@given(sizes, sizes, st.integers(64, 1500), kinds, st.sampled_from([8, 16, 32, 64]), st.booleans())
def test_target_size_is_aligned_and_near_what_was_asked(width, height, resolution, kind, multiple, square):
    wide, high = target_size(
        width, height, resolution=resolution, resolution_type=kind, multiple=multiple, square=square
    )
    assert wide % multiple == high % multiple == 0
    aspect = 1 if square else width / height
    exact_short = resolution if kind == "pixel" else resolution * min(aspect, 1 / aspect) ** 0.5
    assert abs(min(wide, high) - max(exact_short, multiple / 2)) <= multiple / 2 + 1e-6
    if square:
        assert wide == high
    elif width > height:
        assert wide >= high


@pytest.mark.parametrize(
    ("kind", "resolution", "expected"),
    [("pixel", 480, (848, 480)), ("pixel_area", 512, (688, 384)), ("area", 0.25, (672, 368))],
)
def test_target_size_units(kind, resolution, expected):
    assert target_size(1920, 1080, resolution=resolution, resolution_type=kind, multiple=16) == expected


@given(
    sizes, sizes, st.integers(1, 60), st.integers(1, 60), st.sampled_from(["center", "random", "corner"]),
    st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_crop_lies_inside_the_resized_picture(width, height, columns, rows, style, x, y):
    target = (columns * 16, rows * 16)
    plan = crop_plan(width, height, target, style=style, draw=(x, y))
    assert (plan.width, plan.height) == target
    assert 0 <= plan.left <= plan.resized_width - plan.width
    assert 0 <= plan.top <= plan.resized_height - plan.height
    # covering, not more: one side fits exactly
    assert plan.resized_width == plan.width or plan.resized_height == plan.height
    # the aspect ratio is kept to within a pixel
    scale = max(target[0] / width, target[1] / height)
    assert abs(plan.resized_width - width * scale) <= 1
    assert abs(plan.resized_height - height * scale) <= 1


def test_random_crops_reach_both_ends():
    plans = [crop_plan(200, 100, (96, 96), style="random", draw=(x, 0.5)).left for x in (0.0, 0.999999)]
    assert plans == [0, 96]  # 192 wide after resizing


@given(st.integers(1, 500), st.sampled_from([8, 12, 15, 24, 25, 30, 50, 60]))
def test_a_clip_at_its_own_rate_has_its_own_frames(frames, rate):
    assert frames_at_rate(frames / rate, rate, rate) == frames


@given(st.integers(1, 90), st.sampled_from([12, 24, 25, 30]), st.sampled_from([8, 12, 16, 24, 25, 30, 48, 60]))
def test_every_grid_time_within_the_clip_counts(frames, source, rate):
    late = [Fraction(frames, source) - Fraction(i, rate) for i in range(frames * 5 + 1)]  # how long it still shows
    surely = sum(left > Fraction(1, 10 * max(source, rate)) for left in late)  # a tenth of a frame
    assert surely <= frames_at_rate(frames / source, source, rate) <= sum(left > 0 for left in late)


def test_timestamps_in_milliseconds_do_not_add_a_frame():
    assert frames_at_rate(1.0007, 23.99, 24) == 24


rule = FrameRule(4, 121)


@given(
    st.integers(1, 400), st.none() | st.integers(1, 100), st.none() | st.integers(1, 300),
    st.none() | st.integers(1, 50),
)  # fmt: skip
def test_the_clips_own_length_is_legal_and_within_every_limit(available, low, high, interval):
    frames = choose_frames(available, rule=rule, min_frames=low, max_frames=high, frame_interval=interval)
    if isinstance(frames, Refusal):
        capped = min(available, high) if high else available
        assert available < (low or 1) or capped < (interval or 1)
    else:
        assert rule.problem(frames) is None
        assert frames <= available
        assert not high or frames <= high


@given(st.integers(1, 400), st.sampled_from([1, 17, 61, 121]), st.none() | st.integers(1, 300))
def test_a_fixed_length_is_exact_or_refused(available, wanted, high):
    frames = choose_frames(available, rule=rule, num_frames=wanted, max_frames=high)
    fits = wanted <= available and (high is None or available <= high)
    assert frames == wanted if fits else isinstance(frames, Refusal)


def test_frame_interval_rounds_down_before_the_models_rule():
    assert choose_frames(50, rule=rule, frame_interval=12) == 45  # 48, then 4k+1
    short = choose_frames(5, rule=rule, frame_interval=12)
    assert short == Refusal("too short (fewer than frame_interval = 12 frames)", "5 frames")


def test_reasons():
    assert choose_frames(60, rule=rule, num_frames=61) == Refusal("too short (fewer than 61 frames)", "60 frames")
    assert choose_frames(70, rule=rule, num_frames=61, min_frames=80) == Refusal(
        "too short (fewer than 80 frames)", "70 frames"
    )
    assert choose_frames(90, rule=rule, num_frames=61, max_frames=80) == Refusal(
        "too long (more than 80 frames)", "90 frames"
    )


def test_bucket_key():
    assert Bucket(832, 480, 61).key == "832x480@61"
