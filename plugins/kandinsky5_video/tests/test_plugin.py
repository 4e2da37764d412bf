"""The plugin as core sees it."""

from __future__ import annotations

from hooktuner.testing import PluginConformance


class TestConformance(PluginConformance):
    plugin = "kandinsky5-video"
