"""Stateless randomness: every draw is a function of (seed, purpose, numbers).

Nothing has to be saved to resume, the number of loader workers does not matter, and for a fixed global batch
neither does the number of processes. Draws are made on the CPU, so that they are the same on every device.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a hash of its arguments; unrelated for different purposes or numbers."""
    text = "\x1f".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A fresh CPU generator for one draw, e.g. `generator(run.config.seed, "noise", sample_index)`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """One number in [0, 1), without torch: for yes-or-no decisions and orders."""
    return derive_seed(seed, purpose, *numbers) / 2**63
