"""Which pixel frames a latent frame stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hooktuner_crepa.frames import source_frames


@pytest.mark.parametrize(("pixels", "stride"), [(81, 4), (49, 4), (121, 8), (9, 4), (1, 4), (1, 1), (5, 1), (61, 4)])
def test_last_is_the_even_spacing_of_whole_clips(pixels, stride):
    frames = (pixels - 1) // stride + 1
    found = source_frames("last", pixels, frames, stride)
    wanted = np.linspace(0, pixels - 1, frames).round().astype(int)
    assert found == [[int(index)] for index in wanted]


def test_center_is_in_the_middle_of_the_group():
    assert source_frames("center", 13, 4, 4) == [[0], [3], [7], [11]]
    assert source_frames("center", 17, 3, 8) == [[0], [5], [13]]
    assert source_frames("center", 4, 4, 1) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(("pixels", "stride"), [(81, 4), (121, 8), (3, 1), (1, 4)])
def test_mean_has_every_frame_once_and_center_and_last_are_of_its_groups(pixels, stride):
    frames = (pixels - 1) // stride + 1
    groups = source_frames("mean", pixels, frames, stride)
    assert [frame for group in groups for frame in group] == list(range(pixels))
    for frame_map in ("center", "last"):
        for one, group in zip(source_frames(frame_map, pixels, frames, stride), groups, strict=True):
            assert one[0] in group


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="24 frames do not give 6 latent frames with one latent frame per 4"):
        source_frames("last", 24, 6, 4)
