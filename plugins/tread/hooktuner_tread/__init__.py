"""TREAD token routing for hooktuner: the technique `tread`. Importing it does not import torch."""

NAME = "tread"
"""The plugin's name: what users type, and the key of its options."""

__all__ = ["NAME"]
