"""Kandinsky 5.0 Video for hooktuner: the model family `kandinsky5-video`. Importing it does not import torch."""

NAME = "kandinsky5-video"
"""The plugin's name: what users type, and the key of its options."""

__all__ = ["NAME"]
