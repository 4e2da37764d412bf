"""Captions: the pipeline's own encoding, each alone."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
from hooktuner.family import Part
from hooktuner_kandinsky5_video.processor import TextProcessor

CAPTIONS = ["a dog", "Two cats &amp; a  dog\n cross the bridge at dusk, filmed from above", ""]


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    """The complete pipeline, loaded without this plugin's loader (but for torchvision)."""
    path = checkpoints["tiny"]
    return Kandinsky5T2VPipeline.from_pretrained(
        path, tokenizer=TextProcessor.from_pretrained(path, subfolder="tokenizer")
    )


@pytest.mark.parametrize("flavour", ["tiny", "tiny-i2v"])
def test_embeddings_are_the_pipelines(make_run, plugin, pipeline, flavour):
    run = make_run(flavour)
    encoder = plugin.load_model(run, Part.TEXT_ENCODER)
    for caption, encoded in zip(CAPTIONS, plugin.encode_text(run, encoder, CAPTIONS), strict=True):
        with torch.no_grad():
            qwen, clip, lengths = pipeline.encode_prompt(caption)
        assert encoded["qwen_LD"].shape == (int(lengths[-1]), 32)
        assert torch.equal(encoded["qwen_LD"], qwen[0])
        assert torch.equal(encoded["clip_D"], clip[0])


def test_the_whole_caption_and_nothing_else_is_kept(make_run, plugin):
    run = make_run()
    encoder = plugin.load_model(run, Part.TEXT_ENCODER)
    encoded = plugin.encode_text(run, encoder, CAPTIONS)
    cleaned = ["a dog", "Two cats & a dog cross the bridge at dusk, filmed from above", ""]
    for caption, one in zip(cleaned, encoded, strict=True):
        expected = len(encoder.tokenizer.tokenizer(caption + "<|im_end|>")["input_ids"])
        assert one["qwen_LD"].shape[0] == expected
    assert encoded[2]["qwen_LD"].shape[0] == 1


def test_a_caption_is_the_same_beside_a_longer_one(make_run, plugin):
    run = make_run()
    encoder = plugin.load_model(run, Part.TEXT_ENCODER)
    together = plugin.encode_text(run, encoder, CAPTIONS)
    for caption, one in zip(CAPTIONS, together, strict=True):
        alone = plugin.encode_text(run, encoder, [caption])[0]
        assert all(torch.equal(alone[name], one[name]) for name in ("qwen_LD", "clip_D"))


def test_longest_caption(make_run, plugin):
    run = make_run(tokenizer_max_length=8)
    encoder = plugin.load_model(run, Part.TEXT_ENCODER)
    assert plugin.encode_text(run, encoder, ["a dog " * 50])[0]["qwen_LD"].shape[0] <= 8
    assert plugin.encode_text(make_run(), encoder, ["a dog " * 50])[0]["qwen_LD"].shape[0] > 100
