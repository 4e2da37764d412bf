"""The toy family conforms, in both flavours."""

from __future__ import annotations

from hooktuner.testing import PluginConformance, ToyFamily


class TestToy(PluginConformance):
    plugin = ToyFamily
    tiny_flavour = "toy"


class TestToyImageToVideo(PluginConformance):
    plugin = ToyFamily
    tiny_flavour = "toy-i2v"
