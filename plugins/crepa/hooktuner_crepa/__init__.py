"""CREPA for hooktuner: cross-frame representation alignment. The plugin is `hooktuner_crepa.plugin.Crepa`."""

from __future__ import annotations

NAME = "crepa"
"""What users type, the key in `run.options` and the prefix of cached features."""
