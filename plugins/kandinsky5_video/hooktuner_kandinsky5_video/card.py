"""The model card: flavours and their repositories, defaults, rules, and the checks before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooktuner.errors import Problem
from hooktuner.family import Flavour, FrameRule, LatentSpec, ModelCard

from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.geometry import (
    FRAME_STRIDE,
    I2V_MIN_FRAMES,
    MAX_EDGE,
    MAX_FRAMES,
    NABLA_SIZE_MULTIPLE,
    SIZE_MULTIPLE,
    SPATIAL_STRIDE,
    wants_nabla,
)
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions

if TYPE_CHECKING:
    from hooktuner.context import Run
    from hooktuner.family import Anatomy

FIRST_FRAME = frozenset({"first_frame"})
NEGATIVE_PROMPT = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
"""The default negative prompt of the diffusers pipelines."""
LORA_TARGETS = (
    r"(text|visual)_transformer_blocks\.\d+\."
    r"((self|cross)_attention\.(to_query|to_key|to_value|out_layer)|feed_forward\.(in_layer|out_layer))"
)
"""Attention and feed-forward of both block lists. Anchored by full names: a bare `out_layer` would also hit the time
embedding, the modulations and the output head."""

LATENTS = LatentSpec(16, SPATIAL_STRIDE, FrameRule(FRAME_STRIDE, MAX_FRAMES), SIZE_MULTIPLE)
NABLA_LATENTS = LatentSpec(16, SPATIAL_STRIDE, FrameRule(FRAME_STRIDE, MAX_FRAMES), NABLA_SIZE_MULTIPLE)


def _released(name: str, repository: str, summary: str, *, nabla: bool = False, **more: Any) -> Flavour:
    return Flavour(
        name=name,
        summary=summary,
        repository=f"kandinskylab/Kandinsky-5.0-{repository}-Diffusers",
        latents=NABLA_LATENTS if nabla else None,
        settings={"attention": "nabla" if nabla else "regular", "rope_scale": "auto"},
        **more,
    )


def _tiny(
    name: str, summary: str, size: str, frames: int, *, nabla: bool = False, first_frame: bool = False
) -> Flavour:
    # The tiny checkpoints have seen no size, so they follow the unmodified pipeline's rope rule.
    return Flavour(
        name=name,
        summary=summary,
        build=partial(_build_tiny, nabla=nabla, first_frame=first_frame),
        conditioning=FIRST_FRAME if first_frame else frozenset(),
        defaults={"validation_resolution": size, "validation_num_video_frames": frames},
        latents=NABLA_LATENTS if nabla else None,
        settings={"attention": "nabla" if nabla else "regular", "rope_scale": "pipeline"},
    )


def _build_tiny(path: Path, *, nabla: bool, first_frame: bool) -> None:
    from hooktuner_kandinsky5_video.tiny import build

    build(
        path,
        attention="nabla" if nabla else "regular",
        conditioning="first_frame" if first_frame else "none",
    )


def _flavours() -> Iterator[Flavour]:
    for stage, what in (("sft", "fine-tuned"), ("pretrain", "pretrained")):
        yield _released(f"t2v-lite-{stage}-5s", f"T2V-Lite-{stage}-5s", f"2B text-to-video, 5 s, {what}")
        yield _released(f"t2v-lite-{stage}-10s", f"T2V-Lite-{stage}-10s", f"2B text-to-video, 10 s, {what}", nabla=True)
    for stage, what in (("nocfg", "guidance-distilled"), ("distilled16steps", "distilled to 16 steps")):
        for seconds in (5, 10):
            yield _released(
                f"t2v-lite-{stage}-{seconds}s",
                f"T2V-Lite-{stage}-{seconds}s",
                f"2B text-to-video, {seconds} s, {what}",
                nabla=seconds == 10,
                defaults={"validation_guidance": 1.0},
            )
    for stage, what in (("sft", "fine-tuned"), ("pretrain", "pretrained")):
        for seconds in (5, 10):
            yield _released(
                f"t2v-pro-{stage}-{seconds}s-hd",
                f"T2V-Pro-{stage}-{seconds}s",
                f"19B text-to-video, {seconds} s, high definition, {what}",
                nabla=True,
            )
    yield _released("i2v-lite-5s", "I2V-Lite-5s", "2B image-to-video, 5 s", conditioning=FIRST_FRAME)
    yield _released(
        "i2v-pro-sft-5s", "I2V-Pro-sft-5s", "19B image-to-video, 5 s, fine-tuned", nabla=True, conditioning=FIRST_FRAME
    )
    yield _tiny("tiny", "random text-to-video weights of 1.4 MB, built offline, for tests and demos", "96x64", 5)
    yield _tiny("tiny-i2v", "random image-to-video weights, built offline", "96x64", I2V_MIN_FRAMES, first_frame=True)
    yield _tiny("tiny-nabla", "random text-to-video weights with NABLA, built offline", "128x128", 5, nabla=True)


FLAVOURS: Mapping[str, Flavour] = {flavour.name: flavour for flavour in _flavours()}


# ----------------------------------------------------------------------------------------- checks before loading


def check(run: Run) -> Iterator[Problem]:
    """What this family cannot do, found before anything is loaded."""
    options = run.options_of(NAME, Kandinsky5VideoOptions)
    flavour, config = run.flavour, run.config
    attention = flavour.settings["attention"]
    if options.sparse_attention == "nabla":
        if attention != "nabla":
            yield Problem(
                "sparse_attention",
                f'the checkpoint of "{flavour.name}" was trained with dense attention',
                'Use "auto" or "dense", or a 10s or pro flavour.',
            )
        elif run.device is not None and run.device.type != "cuda":
            yield nabla_refusal("sparse_attention", run.device.type)
    if options.i2v_dropout_probability and "first_frame" not in flavour.conditioning:
        yield Problem(
            "i2v_dropout_probability",
            f'"{flavour.name}" is a text-to-video flavour and has no first frame to leave out',
            "Remove the key, or choose an i2v flavour.",
        )
    if not config.validation_disable:
        yield from _check_validation(run, options, attention)


def _check_validation(run: Run, options: Kandinsky5VideoOptions, attention: str) -> Iterator[Problem]:
    frames = run.config.validation_num_video_frames or 1
    if "first_frame" in run.flavour.conditioning and frames < I2V_MIN_FRAMES:
        yield Problem(
            "validation_num_video_frames",
            f"{frames} frames are too few for image-to-video sampling: the diffusers pipeline normalises the first "
            "four latent frames by those that follow, and without any the video is not a number",
            f"Use at least {I2V_MIN_FRAMES} frames, or set validation_disable.",
        )
    try:
        sizes = run.config.validation_sizes()
    except ValueError:  # core says what is wrong with it
        return
    for width, height in sizes:
        if max(width, height) > MAX_EDGE:
            yield Problem(
                "validation_resolution",
                f"{width}x{height} is beyond the model's positions ({MAX_EDGE} pixels per edge)",
                f"Use at most {MAX_EDGE} pixels.",
            )
        elif (
            options.sparse_attention == "auto"
            and run.device is not None
            and run.device.type != "cuda"
            and wants_nabla("auto", attention, LATENTS.frames.latent_frames(frames), height, width)
        ):
            yield nabla_refusal(f"validation_resolution {width}x{height}, {frames} frames", run.device.type)


def check_clips(run: Run, clips: Iterable[tuple[int, int, int]]) -> Iterator[Problem]:
    """Clips that would be attended sparsely on a device that cannot."""
    choice = run.options_of(NAME, Kandinsky5VideoOptions).sparse_attention
    device = run.device.type if run.device is not None else "cuda"
    for frames, height, width in clips:
        latent_frames = LATENTS.frames.latent_frames(frames)
        if device != "cuda" and wants_nabla(choice, run.flavour.settings["attention"], latent_frames, height, width):
            yield nabla_refusal(f"training clips of {width}x{height}, {frames} frames", device)


def nabla_refusal(where: str, device: str) -> Problem:
    """Why NABLA cannot run here. Uncompiled flex attention ignores the block list and computes full attention with
    all scores in memory; its backward pass exists on CUDA only."""
    return Problem(
        where,
        f"NABLA attention needs a CUDA device (compiled flex attention), and this run is on {device}",
        'Set "sparse_attention": "dense", or use a machine with CUDA.',
    )


def _anatomy(run: Run) -> Anatomy:
    from hooktuner_kandinsky5_video.anatomy import Kandinsky5Anatomy

    return Kandinsky5Anatomy()


CARD = ModelCard(
    name=NAME,
    summary="Kandinsky 5.0 Video: text-to-video and image-to-video, 2B Lite and 19B Pro",
    media="video",
    flavours=FLAVOURS,
    default_flavour="t2v-lite-sft-5s",
    check_clips=check_clips,
    latents=LATENTS,
    lora_targets=LORA_TARGETS,
    defaults={
        "frame_rate": 24.0,
        "flow_schedule_shift": 5.0,
        "validation_guidance": 5.0,
        "validation_negative_prompt": NEGATIVE_PROMPT,
        "validation_resolution": "768x512",
        "validation_num_video_frames": 61,
    },
    offers=frozenset({"blocks", "token_routing", "frames"}),
    check=check,
    anatomy=_anatomy,
)
