from __future__ import annotations

import pytest
from hooktuner.config import RunConfig
from hooktuner.data.buckets import Refusal
from hooktuner.data.captions import read_captions
from hooktuner.data.entries import VideoDataset

CONFIG = RunConfig.model_validate({})


def captions(path, **changes):
    dataset = VideoDataset.model_validate({"id": "v", "instance_data_dir": str(path.parent), **changes})
    return read_captions(path, dataset, CONFIG)


def test_lines_of_a_text_file_are_alternatives(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa red fox \n\n  an animal\na red fox\n", encoding="utf-8")
    assert captions(tmp_path / "a.mp4") == ("a red fox", "an animal")
    assert captions(tmp_path / "a.mp4", disable_multiline_split=True) == ("a red fox \n\n  an animal\na red fox",)


@pytest.mark.parametrize(
    ("content", "detail"),
    [(None, "a.txt is missing"), (b" \n", "a.txt is empty"), (b"\xff\xfe\xfa", "a.txt is not UTF-8 text")],
)
def test_a_caption_that_cannot_be_had_is_an_answer(tmp_path, content, detail):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    assert captions(tmp_path / "a.mp4") == Refusal("no caption", detail)


def test_file_names(tmp_path):
    assert captions(tmp_path / "a_red_fox.v2.mp4", caption_strategy="filename") == ("a red fox.v2",)


def test_instance_prompts(tmp_path):
    path = tmp_path / "fox.mp4"
    assert captions(path, caption_strategy="instanceprompt", instance_prompt="sks") == ("sks",)
    assert captions(path, caption_strategy="instanceprompt", instance_prompt=["one", "two"]) == ("one", "two")
    assert captions(
        path, caption_strategy="filename", instance_prompt=["one", "two"], prepend_instance_prompt=True
    ) == ("one fox", "two fox")
