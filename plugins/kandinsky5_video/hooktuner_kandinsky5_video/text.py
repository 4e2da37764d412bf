"""Captions to embeddings, by the pipeline's own `encode_prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hooktuner.context import Run

from hooktuner_kandinsky5_video import NAME
from hooktuner_kandinsky5_video.options import Kandinsky5VideoOptions


def encode_captions(run: Run, encoder: Any, captions: Sequence[str]) -> list[Mapping[str, torch.Tensor]]:
    """`qwen_LD` (L, 3584) and `clip_D` (768,) of each caption, in the encoder's dtype.

    One caption per call: the pipeline pads the captions of a batch to the longest and the denoiser has no text mask,
    so a caption that was encoded beside a longer one would not be what it is alone. The pipeline cleans the caption,
    puts it into its template, cuts the template's 128 tokens off again, and shortens what is longer than
    `tokenizer_max_length`; the mark that ends the user's turn stays, so "" has one token.
    """
    length = run.options_of(NAME, Kandinsky5VideoOptions).tokenizer_max_length
    encoded = []
    with torch.no_grad():
        for caption in captions:
            qwen_1LD, clip_1D, _ = encoder.encode_prompt(caption, max_sequence_length=length, device=run.device)
            encoded.append({"qwen_LD": qwen_1LD[0].clone(), "clip_D": clip_1D[0].clone()})
    return encoded
