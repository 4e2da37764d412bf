"""Flow matching, in one place.

Convention: σ = 0 is data, σ = 1 is noise.

    x_σ = (1 − σ)·x0 + σ·ε          the straight path (Liu et al. 2022, "Flow Straight and Fast", eq. 1;
                                     Lipman et al. 2022, "Flow Matching for Generative Modeling", sec. 4.1)
    v   = dx/dσ = ε − x0            the target
    t   = 1000·σ                    what the denoisers of diffusers call a timestep, in float32, never rounded

Training draws σ from a continuous law and shifts it (Esser et al. 2024, "Scaling Rectified Flow Transformers",
sec. 3.1 and eq. 23); it never reads a scheduler's table, which is quantised and, for some schedulers, shifted twice.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0


def append_dims(values_B: Tensor, like: Tensor) -> Tensor:
    """`values_B` with trailing axes of size 1, to broadcast against `like`."""
    return values_B.reshape(values_B.shape[0], *(1,) * (like.ndim - 1))


def interpolate(latents: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """x_σ = (1−σ)·x0 + σ·ε, in the dtype of `latents`."""
    sigma = append_dims(sigma_B, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """The target v = ε − x0."""
    return noise - latents


def timestep(sigma_B: Tensor) -> Tensor:
    """1000·σ in float32."""
    return sigma_B.float() * TIMESTEP_SCALE


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """s·σ / (1 + (s−1)·σ): more noise for s > 1. Exactly the identity for s = 1."""
    if shift == 1.0:
        return sigma
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(
    count: int,
    generator: torch.Generator,
    *,
    law: str = "sigmoid",
    sigmoid_scale: float = 1.0,
    beta: tuple[float, float] = (2.0, 2.0),
    shift: float = 1.0,
) -> Tensor:
    """Draw σ for `count` samples, float32 on the CPU, strictly inside (0, 1).

    law: `sigmoid` (u = sigmoid(scale·N(0,1)), the logit-normal law), `uniform`, or `beta` (Beta(a, b)).
    The law is computed in float64, so that the tails are right, and shifted last.
    """
    if law == "sigmoid":
        u = torch.sigmoid(sigmoid_scale * torch.randn(count, generator=generator, dtype=torch.float64))
    elif law == "uniform":
        u = torch.rand(count, generator=generator, dtype=torch.float64)
    elif law == "beta":
        u = _draw_beta(count, *beta, generator=generator)
    else:
        raise ValueError(f"unknown law {law!r}; known: sigmoid, uniform, beta")
    sigma = shift_sigma(u, shift)
    tiny = torch.finfo(torch.float32).eps
    return sigma.clamp(tiny, 1 - tiny).float()


def _draw_beta(count: int, a: float, b: float, *, generator: torch.Generator) -> Tensor:
    """Beta(a, b) from numpy (torch has no seeded public one), seeded by one draw of `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(a, b, count))


def mean_squared_error(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Per-sample mean of (prediction − target)², in float32, shape (B,).

    `weight` broadcasts against the target; the mean is over the weighted elements, so a masked region does not
    shrink the gradient of the rest. A sample without any weight has loss 0.
    """
    error = (prediction.float() - target.float()).square()
    if weight is None:
        return error.flatten(1).mean(dim=1)
    weight = weight.expand_as(error)
    return (error * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1).clamp_min(1e-12)
