"""The plugin as core sees it."""

from __future__ import annotations

from hooktuner.testing import PluginConformance


class TestConformance(PluginConformance):
    plugin = "crepa"
    options = {  # noqa: RUF012
        "crepa_enabled": True,
        "crepa_block_index": 1,
        "crepa_encoder": "tiny",
        "crepa_encoder_image_size": 42,
        "crepa_similarity_threshold": 0.05,
        "crepa_similarity_ema_decay": 0.5,
        "crepa_threshold_mode": "recoverable",
        "crepa_warmup_steps": 3,
    }
    neutral = {**options, "crepa_lambda": 0.0}  # noqa: RUF012
