"""What a machine cannot run is refused before anything is loaded."""

from __future__ import annotations

import hooktuner
import pytest
from hooktuner.errors import ConfigError
from hooktuner.testing import make_project
from rich.console import Console


def test_clips_that_need_sparse_attention_are_refused_off_cuda_before_caching(tmp_path):
    path = make_project(
        tmp_path, family="kandinsky5-video", flavour="tiny-nabla", clips=1, frames=125, size=(128, 128), rate=24.0,
        frame_rate=24.0, max_train_steps=1,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"training clips of 128x128, 125 frames — NABLA attention needs a CUDA"):
        hooktuner.run(path, console=Console(quiet=True))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_the_same_clips_train_densely_where_asked(tmp_path):
    path = make_project(
        tmp_path, family="kandinsky5-video", flavour="tiny-nabla", clips=1, frames=5, size=(128, 128),
        max_train_steps=1, sparse_attention="dense",
    )  # fmt: skip
    assert hooktuner.run(path, console=Console(quiet=True)).steps == 1
