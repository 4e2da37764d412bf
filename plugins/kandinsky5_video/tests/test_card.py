"""Flavours, defaults, rules and refusals."""

from __future__ import annotations

import re

import pytest
import torch
from hooktuner_kandinsky5_video.card import CARD, LORA_TARGETS, check
from hooktuner_kandinsky5_video.geometry import HD_ROPE, SD_ROPE, rope_scale, wants_nabla

REPOSITORIES = {
    "t2v-lite-sft-5s": "T2V-Lite-sft-5s",
    "t2v-lite-pretrain-5s": "T2V-Lite-pretrain-5s",
    "t2v-lite-sft-10s": "T2V-Lite-sft-10s",
    "t2v-lite-pretrain-10s": "T2V-Lite-pretrain-10s",
    "t2v-lite-nocfg-5s": "T2V-Lite-nocfg-5s",
    "t2v-lite-nocfg-10s": "T2V-Lite-nocfg-10s",
    "t2v-lite-distilled16steps-5s": "T2V-Lite-distilled16steps-5s",
    "t2v-lite-distilled16steps-10s": "T2V-Lite-distilled16steps-10s",
    "t2v-pro-sft-5s-hd": "T2V-Pro-sft-5s",
    "t2v-pro-sft-10s-hd": "T2V-Pro-sft-10s",
    "t2v-pro-pretrain-5s-hd": "T2V-Pro-pretrain-5s",
    "t2v-pro-pretrain-10s-hd": "T2V-Pro-pretrain-10s",
    "i2v-lite-5s": "I2V-Lite-5s",
    "i2v-pro-sft-5s": "I2V-Pro-sft-5s",
}


def test_every_released_flavour_has_its_repository():
    found = {name: one.repository for name, one in CARD.flavours.items() if one.repository}
    assert found == {name: f"kandinskylab/Kandinsky-5.0-{repo}-Diffusers" for name, repo in REPOSITORIES.items()}
    assert CARD.default_flavour == "t2v-lite-sft-5s"
    assert {name for name, one in CARD.flavours.items() if one.build} == {"tiny", "tiny-i2v", "tiny-nabla"}


def test_which_flavours_have_a_first_frame():
    conditioned = {name for name, one in CARD.flavours.items() if "first_frame" in one.conditioning}
    assert conditioned == {"i2v-lite-5s", "i2v-pro-sft-5s", "tiny-i2v"}


def test_defaults():
    defaults = CARD.defaults_of("t2v-lite-sft-5s")
    assert defaults["frame_rate"] == 24
    assert defaults["flow_schedule_shift"] == 5
    assert defaults["validation_guidance"] == 5
    assert defaults["validation_resolution"] == "768x512"
    assert CARD.defaults_of("t2v-lite-nocfg-5s")["validation_guidance"] == 1


def test_negative_prompt_is_the_pipelines():
    import inspect

    from diffusers.pipelines.kandinsky5 import pipeline_kandinsky, pipeline_kandinsky_i2v

    for module in (pipeline_kandinsky, pipeline_kandinsky_i2v):
        assert f'negative_prompt = "{CARD.defaults["validation_negative_prompt"]}"' in inspect.getsource(module)


def test_frame_rule_names_the_nearest_numbers():
    rule = CARD.latents.frames
    assert rule.problem(49) is None
    assert rule.problem(50) == "50 frames do not fit: the number must be 4k+1; the nearest are 49 or 53"
    assert "at most 509" in str(rule.problem(513))
    assert CARD.latents.shape(61, 512, 768) == (16, 16, 64, 96)


def test_nabla_flavours_need_larger_multiples():
    assert CARD.latents_of("t2v-lite-sft-5s").size_multiple == 16
    assert CARD.latents_of("t2v-pro-sft-5s-hd").size_multiple == 128
    assert CARD.latents_of("t2v-lite-sft-10s").size_multiple == 128


def test_lora_targets_are_the_attention_and_feed_forward_of_both_lists():
    from hooktuner_kandinsky5_video.tiny import denoiser

    linears = {name for name, one in denoiser().named_modules() if isinstance(one, torch.nn.Linear)}
    hit = {name for name in linears if re.fullmatch(LORA_TARGETS, name)}
    assert len(hit) == 2 * 6 + 4 * 10
    missed = {re.sub(r"\d+", "i", name) for name in linears - hit}
    assert missed == {
        "time_embeddings.in_layer",
        "time_embeddings.out_layer",
        "text_embeddings.in_layer",
        "pooled_text_embeddings.in_layer",
        "visual_embeddings.in_layer",
        "text_transformer_blocks.i.text_modulation.out_layer",
        "visual_transformer_blocks.i.visual_modulation.out_layer",
        "out_layer.modulation.out_layer",
        "out_layer.out_layer",
    }


@pytest.mark.parametrize(
    ("rule", "height", "width", "scale"),
    [
        ("auto", 512, 768, SD_ROPE),
        ("auto", 256, 384, SD_ROPE),
        ("auto", 768, 1280, HD_ROPE),
        ("pipeline", 480, 854, SD_ROPE),
        ("pipeline", 256, 384, HD_ROPE),
        ("pipeline", 512, 864, HD_ROPE),
        ("sd", 1024, 1024, SD_ROPE),
        ("hd", 512, 512, HD_ROPE),
    ],
)
def test_rope_scale(rule, height, width, scale):
    assert rope_scale(rule, height, width) == scale


def test_rope_rule_of_the_pipeline_is_the_pipelines():
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline

    for height in (64, 479, 480, 854, 855, 1280):
        for width in (464, 480, 512, 854, 864):
            assert rope_scale("pipeline", height, width) == Kandinsky5T2VPipeline._get_scale_factor(None, height, width)


def test_where_nabla_applies():
    assert not wants_nabla("auto", "regular", 61, 1024, 1024)
    assert not wants_nabla("auto", "nabla", 31, 512, 768)
    assert wants_nabla("auto", "nabla", 32, 512, 768)
    assert wants_nabla("auto", "nabla", 13, 768, 1280)
    assert not wants_nabla("dense", "nabla", 61, 1024, 1024)
    assert wants_nabla("nabla", "nabla", 2, 128, 128)


def problems(run) -> list[str]:
    return [str(problem) for problem in check(run)]


@pytest.mark.parametrize("flavour", list(CARD.flavours))
def test_defaults_pass_the_check(make_run, flavour):
    assert problems(make_run(flavour)) == []


@pytest.mark.parametrize(
    ("flavour", "config", "options", "sentence"),
    [
        (
            "t2v-lite-sft-5s",
            {},
            {"sparse_attention": "nabla"},
            'sparse_attention — the checkpoint of "t2v-lite-sft-5s" was trained with dense attention. Use "auto"',
        ),
        (
            "t2v-pro-sft-5s-hd",
            {},
            {"sparse_attention": "nabla"},
            "sparse_attention — NABLA attention needs a CUDA device (compiled flex attention), and this run is on cpu.",
        ),
        (
            "t2v-pro-sft-5s-hd",
            {"validation_resolution": "768x512,1280x768"},
            {},
            "validation_resolution 1280x768, 61 frames — NABLA attention needs a CUDA device",
        ),
        (
            "i2v-lite-5s",
            {"validation_num_video_frames": 13},
            {},
            "validation_num_video_frames — 13 frames are too few for image-to-video sampling",
        ),
        (
            "t2v-lite-sft-5s",
            {"validation_resolution": "2064x512"},
            {},
            "validation_resolution — 2064x512 is beyond the model's positions (2048 pixels per edge).",
        ),
        (
            "t2v-lite-sft-5s",
            {},
            {"i2v_dropout_probability": 0.1},
            'i2v_dropout_probability — "t2v-lite-sft-5s" is a text-to-video flavour',
        ),
    ],
)
def test_refusals(make_run, flavour, config, options, sentence):
    found = problems(make_run(flavour, config, **options))
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_validation_is_not_checked_where_there_is_none(make_run):
    off = {"validation_disable": True, "validation_num_video_frames": 5}
    assert problems(make_run("i2v-lite-5s", off)) == []
