"""Solvers of dx/dσ = v(x, σ) from noise towards data, for a whole micro-batch whose samples have different σ.

With α = 1 − σ, λ = log(α/σ) and the data prediction D = x − σ·v, the exact solution over a step from s to t is
x_t = (σ_t/σ_s)·x_s + α_t ∫ e^(λ−λ_t) D dλ. What differs between solvers is how D is interpolated:

    euler   x_t = x_s + (σ_t − σ_s)·v, which is the first order of the other two
    dpm     DPM-Solver++ multistep, orders 2 ("midpoint") and 3    (Lu et al. 2022, arXiv 2211.01095)
    unipc   UniPC with B(h) = e^(−h) − 1 ("bh2"): UniP of the order, and UniC, which takes up the evaluation at t
            when it is there, so that it costs nothing                (Zhao et al. 2023, arXiv 2302.04867)

Every update is a linear combination of x and of data predictions, so its weights, a few numbers per sample, are made
first; the tensors are then touched once. A sample may start later than others: as long as its nodes repeat, it rests,
and its orders count from its own first step. Shapes: nodes_BN are N values of σ per sample, never increasing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hooktuner.flow import append_dims
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_BCFHW, sigma_B) → velocity_BCFHW."""


def integrate(velocity: Velocity, x_BCFHW: Tensor, nodes_BN: Tensor, *, sampler: str, order: int = 2) -> Tensor:
    """x at the last node, from x at the first; `velocity` is called N − 1 times with all samples.

    sampler: `euler`, `unipc` or `dpm`; order: 1 to 3, of the latter two. nodes_BN: float64, inside (0, 1); several
    equal nodes in front make a sample rest. Nothing is lowered at the end, because the end is not σ = 0.
    """
    if sampler == "euler":
        return _euler(velocity, x_BCFHW, nodes_BN)
    if sampler not in ("unipc", "dpm"):
        raise ValueError(f"unknown sampler {sampler!r}; known: euler, unipc, dpm")
    nodes = _Nodes(nodes_BN)
    x = x_before = x_BCFHW
    data: list[Tensor] = []  # data predictions at the nodes, newest first
    correction: _Weights | None = None
    for step in range(nodes_BN.shape[1] - 1):
        sigma_B = nodes_BN[:, step].to(x)
        data.insert(0, x - append_dims(sigma_B, x) * velocity(x, sigma_B))
        if correction is not None:
            x = correction.apply(x_before, data)
        del data[order:]
        x_before = x
        x = nodes.weights(step, sampler, order).apply(x, data)
        correction = nodes.correction(step, order) if sampler == "unipc" else None
    return x


def _euler(velocity: Velocity, x: Tensor, nodes_BN: Tensor) -> Tensor:
    nodes_BN = nodes_BN.to(x)
    for step in range(nodes_BN.shape[1] - 1):
        sigma_B, next_B = nodes_BN[:, step], nodes_BN[:, step + 1]
        x = x + append_dims(next_B - sigma_B, x) * velocity(x, sigma_B)
    return x


@dataclass
class _Weights:
    """x ← keep·x + Σ of[j]·data[j], per sample; `of` begins with the newest data prediction."""

    keep_B: Tensor
    of: Sequence[Tensor]

    def apply(self, x: Tensor, data: Sequence[Tensor]) -> Tensor:
        result = append_dims(self.keep_B.to(x), x) * x
        for weight_B, prediction in zip(self.of, data, strict=True):
            result = result + append_dims(weight_B.to(x), x) * prediction
        return result


class _Nodes:
    """The small numbers of a rollout: weights of each step, chosen per sample by how many steps it has behind it."""

    def __init__(self, sigma_BN: Tensor) -> None:
        self.sigma_BN = sigma_BN
        self.alpha_BN = 1 - sigma_BN
        self.lambda_BN = self.alpha_BN.log() - sigma_BN.log()
        self._behind = (sigma_BN[:, 1:] < sigma_BN[:, :-1]).long().cumsum(dim=1)  # steps done, this one included

    def weights(self, step: int, sampler: str, order: int) -> _Weights:
        """Of the step from node `step` to the next."""
        make = self._unip if sampler == "unipc" else self._dpm
        return self._choose(step, order, make)

    def correction(self, step: int, order: int) -> _Weights:
        """UniC of the step from node `step` to the next, once the data prediction there is known (it is the newest)."""
        return self._choose(step, order, self._unic)

    def _choose(self, step: int, order: int, make: Callable[[int, int], _Weights]) -> _Weights:
        """The weights of the order that each sample's history allows; a sample that rests has h = 0 and order 1, for
        which every solver's weights are exactly those of staying."""
        candidates = [make(step, p) for p in range(1, min(order, step + 1) + 1)]
        keep_B, length = candidates[0].keep_B, len(candidates[-1].of)
        of = _padded(candidates[0].of, length)
        for p, candidate in enumerate(candidates[1:], 2):
            enough = self._behind[:, step] >= p
            of = [
                torch.where(enough, weight, other)
                for weight, other in zip(_padded(candidate.of, length), of, strict=True)
            ]
        return _Weights(keep_B, of)

    def _step(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(σ_t/σ_s, α_t, h = λ_t − λ_s) of a step."""
        ratio_B = self.sigma_BN[:, step + 1] / self.sigma_BN[:, step]
        return ratio_B, self.alpha_BN[:, step + 1], self.lambda_BN[:, step + 1] - self.lambda_BN[:, step]

    def _ratios(self, step: int, order: int) -> list[Tensor]:
        """r_k = (λ_(s−k) − λ_s)/h of the earlier nodes, all negative."""
        *_, h_B = self._step(step)
        return [(self.lambda_BN[:, step - k] - self.lambda_BN[:, step]) / h_B for k in range(1, order)]

    def _unip(self, step: int, order: int) -> _Weights:
        """UniP. Order 2 takes ½ in place of the system's answer, as the paper does."""
        ratio_B, alpha_B, h_B = self._step(step)
        scale_B, r = alpha_B * torch.expm1(-h_B), self._ratios(step, order)
        rho = [torch.full_like(h_B, 0.5)] if order == 2 else _system(r, h_B)
        shares = [-scale_B * rho_B / r_B for rho_B, r_B in zip(rho, r, strict=True)]
        return _Weights(ratio_B, [-scale_B - _sum(shares, scale_B), *shares])

    def _unic(self, step: int, order: int) -> _Weights:
        """UniC. Order 1 takes ½ in place of the system's answer, as the paper does."""
        ratio_B, alpha_B, h_B = self._step(step)
        scale_B, r = alpha_B * torch.expm1(-h_B), [*self._ratios(step, order), torch.ones_like(h_B)]
        rho = _system(r, h_B) if order > 1 else [torch.full_like(h_B, 0.5)]
        *shares, newest = [-scale_B * rho_B / r_B for rho_B, r_B in zip(rho, r, strict=True)]
        return _Weights(ratio_B, [newest, -scale_B - _sum(shares, scale_B) - newest, *shares])

    def _dpm(self, step: int, order: int) -> _Weights:
        """DPM-Solver++ (multistep): D's Taylor series over λ from divided differences (order 2: "midpoint").

        Order 3 is that of the authors' code and of diffusers, so that rollouts are what sampling is: the second
        divided difference, half the second derivative, stands there for the whole, and the error falls with order 2.
        """
        ratio_B, alpha_B, h_B = self._step(step)
        phi1_B = torch.expm1(-h_B)
        if order == 1:
            return _Weights(ratio_B, [-alpha_B * phi1_B])
        earlier = [-r_B for r_B in self._ratios(step, order)]
        if order == 2:
            slope_B = -0.5 * alpha_B * phi1_B / earlier[0]
            return _Weights(ratio_B, [-alpha_B * phi1_B + slope_B, -slope_B])
        near_B, far_B = earlier[0], earlier[1] - earlier[0]
        phi2_B, phi3_B = phi1_B / h_B + 1, (phi1_B + h_B) / h_B.square() - 0.5
        # With d1 = (D0 − D1)/near and d2 = (D1 − D2)/far, the second difference is (d1 − d2)/(near + far) and the
        # derivative d1 + near·second; the step adds α·φ2·derivative − α·φ3·second.
        second_B = alpha_B * (phi2_B * near_B - phi3_B) / (near_B + far_B)
        on_d1_B, on_d2_B = alpha_B * phi2_B + second_B, -second_B
        newest_B = on_d1_B / near_B
        oldest_B = -on_d2_B / far_B
        return _Weights(ratio_B, [-alpha_B * phi1_B + newest_B, -newest_B - oldest_B, oldest_B])


def _system(r: Sequence[Tensor], h_B: Tensor) -> list[Tensor]:
    """ρ with Σ_k ρ_k·r_k^(n−1) = b_n for n = 1 … len(r), per sample (UniPC, eq. 10 ff., with B = e^(−h) − 1).

    b_n = n!·z·φ_(n+1)(z)/B at z = −h, where φ_1(z) = (e^z − 1)/z and φ_(n+1)(z) = (φ_n(z) − 1/n!)/z.
    Samples that rest get numbers without meaning, which nobody uses; nothing waits for the device.
    """
    if not r:
        return []
    z_B = -h_B
    powers, moments = [], []
    phi_B, factorial = torch.expm1(z_B) / z_B, 1
    for n in range(1, len(r) + 1):
        factorial *= n
        phi_B = (phi_B - 1 / factorial) / z_B
        powers.append(torch.stack([r_B ** (n - 1) for r_B in r], dim=-1))
        moments.append(factorial * phi_B * z_B / torch.expm1(z_B))
    solution, _ = torch.linalg.solve_ex(torch.stack(powers, dim=-2), torch.stack(moments, dim=-1).unsqueeze(-1))
    return list(solution.squeeze(-1).unbind(dim=-1))


def _sum(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack([*tensors, torch.zeros_like(like)]).sum(dim=0)


def _padded(weights: Sequence[Tensor], length: int) -> list[Tensor]:
    return [*weights, *(torch.zeros_like(weights[0]) for _ in range(length - len(weights)))]
