"""Which dtype lives where.

| config            | frozen weights | trained weights       | arithmetic         |
| ----------------- | -------------- | --------------------- | ------------------ |
| bf16, lora        | bfloat16       | float32 (the adapter) | bfloat16 autocast  |
| bf16, full        | –              | float32               | bfloat16 autocast  |
| no                | float32        | float32               | float32            |

Noising, target and loss are always float32. Modules that a model keeps in float32 stay so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hooktuner.config import RunConfig


def weight_dtype(config: RunConfig) -> torch.dtype:
    """The dtype in which the denoiser is loaded."""
    frozen_base = config.model_type == "lora"
    return torch.bfloat16 if config.mixed_precision == "bf16" and frozen_base else torch.float32


def compute_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of matrix products in the denoiser."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast for the denoiser's forward pass; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
