"""Group offload for hooktuner: the technique `group-offload`. Importing it does not import torch."""

NAME = "group-offload"
"""The plugin's name: what users type, and the key of its options."""

__all__ = ["NAME"]
