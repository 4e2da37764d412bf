"""Complete checkpoints with small random weights, built offline in about a second.

The folder has the layout of a released checkpoint and loads through the same `from_pretrained` calls. Two things are
not as small as they could be, because tests on them would be vacuous: the modulations, which the model initialises
to zero so that every block is the identity, are drawn again; and the Qwen tokenizer is trained on the pipeline's
template, so that exactly the template's 128 tokens come before the caption, as with the real vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import Kandinsky5T2VPipeline
from diffusers.pipelines.kandinsky5.pipeline_kandinsky_i2v import Kandinsky5I2VPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from hooktuner_kandinsky5_video.processor import TextProcessor

TEXT_DIM = 32
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
SPLIT_WORDS = {" dynamism": (" dynam", "ism"), " scren": (" scr", "en"), " postprocessing": (" post", "processing")}
"""The words of the template that are two tokens in the real vocabulary; all others are one."""
NABLA = {
    "attention_type": "nabla",
    "attention_P": 0.9,
    "attention_wT": 11,
    "attention_wH": 3,
    "attention_wW": 3,
    "attention_add_sta": True,
    "attention_method": "topcdf",
}


def build(
    path: Path,
    *,
    conditioning: Literal["none", "first_frame"] = "none",
    attention: Literal["regular", "nabla"] = "regular",
    seed: int = 0,
) -> None:
    """Write a checkpoint to the folder `path`: a function of the arguments, bit for bit.

    conditioning: the pipeline class that `model_index.json` names (image-to-video for `first_frame`); the weights
    have the same shapes. attention: the `attention_type` of the denoiser. The global random state is left alone.
    """
    pipeline_class = Kandinsky5I2VPipeline if conditioning == "first_frame" else Kandinsky5T2VPipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        qwen, clip = qwen_tokenizer(), clip_tokenizer()
        pipeline = pipeline_class(
            transformer=denoiser(**(NABLA if attention == "nabla" else {})),
            vae=vae(),
            text_encoder=_qwen(qwen),
            tokenizer=TextProcessor(Qwen2VLImageProcessorPil(), qwen),  # type: ignore[arg-type]
            text_encoder_2=_clip(clip),
            tokenizer_2=clip,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        )
    _assert_template_fits(pipeline)
    with _quiet():
        pipeline.save_pretrained(path)


def denoiser(**config: Any) -> Kandinsky5Transformer3DModel:
    """The denoiser: 2 text and 4 visual blocks of width 32, two heads of 16, with modulations that do something."""
    model = Kandinsky5Transformer3DModel(
        **{
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "in_text_dim": TEXT_DIM,
            "in_text_dim2": TEXT_DIM,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 2,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
            "visual_cond": True,
            **config,
        }
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.normal_(std=0.05)
    return model


def vae() -> AutoencoderKLHunyuanVideo:
    """The VAE: four blocks, because the number of blocks sets the strides (8 in space, 4 in time)."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),  # type: ignore[arg-type]  (annotated as one number)
        layers_per_block=1,
        norm_num_groups=4,
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer, trained so that the template has as many tokens as with the real vocabulary."""
    text = _template().format("")
    for special in SPECIAL_TOKENS:
        text = text.replace(special, "\0")
    pieces: list[str] = []
    for word, halves in SPLIT_WORDS.items():
        text = text.replace(word, "\0")
        pieces.extend(halves)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # type: ignore[call-arg]
        min_frequency=1,  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # type: ignore[call-arg]
    )
    tokenizer.train_from_iterator([*text.split("\0"), *pieces], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[arg-type]
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="right",
    )


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with bytes only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _qwen(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_DIM,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 4]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT_DIM,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        **ids,
    )
    return CLIPTextModel(config).eval()


def _template() -> str:
    empty = dict.fromkeys(
        ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    )
    return Kandinsky5T2VPipeline(**empty).prompt_template  # type: ignore[arg-type]


def _assert_template_fits(pipeline: Any) -> None:
    """The pipeline cuts a fixed number of tokens; they must be the template's, or captions would be cut."""
    before = pipeline.prompt_template.split("{}")[0]
    count = len(pipeline.tokenizer.tokenizer(before)["input_ids"])
    if count != pipeline.prompt_template_encode_start_idx:
        raise AssertionError(
            f"the tiny tokenizer gives the template {count} tokens, not {pipeline.prompt_template_encode_start_idx}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers about saving."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
