"""Velocity fields with known answers. σ: 0 is data, 1 is noise."""

from __future__ import annotations

import torch
from torch import Tensor

MEANS, SPREAD = (-1.5, 1.0), 0.35
"""A two-mode Gaussian mixture, independent in every element; weights ½."""


def exact_velocity(x: Tensor, sigma_B: Tensor) -> Tensor:
    """E[ε − x0 | x_σ = x] of the mixture, in closed form."""
    sigma = sigma_B.reshape(-1, *(1,) * (x.ndim - 1)).to(x)
    alpha, variance = 1 - sigma, (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    scores = torch.stack([-((x - alpha * mean) ** 2) / (2 * variance) for mean in MEANS])
    velocities = torch.stack([-mean + (x - alpha * mean) * (sigma - alpha * SPREAD**2) / variance for mean in MEANS])
    return (torch.softmax(scores, dim=0) * velocities).sum(dim=0)


def reference(x: Tensor, start_B: Tensor, end_B: Tensor, steps: int = 400) -> Tensor:
    """The solution of dx/dσ = v by classical Runge–Kutta of order 4, in float64."""
    x, start_B, end_B = x.double(), start_B.double(), end_B.double()
    width_B = (end_B - start_B) / steps
    width = width_B.reshape(-1, *(1,) * (x.ndim - 1))
    for step in range(steps):
        s = start_B + step * width_B
        k1 = exact_velocity(x, s)
        k2 = exact_velocity(x + width / 2 * k1, s + width_B / 2)
        k3 = exact_velocity(x + width / 2 * k2, s + width_B / 2)
        k4 = exact_velocity(x + width * k3, s + width_B)
        x = x + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x
