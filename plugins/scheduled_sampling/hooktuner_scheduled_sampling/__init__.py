"""Scheduled sampling for hooktuner: the technique `scheduled-sampling`. Importing it does not import torch."""

NAME = "scheduled-sampling"
"""The plugin's name: what users type, the key of its options, and of its notes in a step."""

__all__ = ["NAME"]
