"""How wrong is the target of a rolled-out state, if the model that is rolled out is already right?

A two-mode Gaussian in one dimension has its velocity field in closed form. Pairs (data, noise) are noised at the source
σ, carried to a lower σ along the exact field by the solver of the plugin `scheduled-sampling`, and regressed on the two
targets that the plugin offers, by the mean in each of many narrow bins: what a perfect regressor would learn there. The
printed number is its root mean square distance from the true field, as a share of the true field's.

    python benchmarks/rollout_bias.py --samples 4000000
"""

from __future__ import annotations

import argparse

import torch
from hooktuner.flow import interpolate, velocity
from hooktuner_scheduled_sampling.solvers import integrate
from torch import Tensor

MEANS, SPREAD = (-1.5, 1.0), 0.35
BINS = 120


def field(x: Tensor, sigma: Tensor) -> Tensor:
    """E[ε − x0 | x] at σ of the mixture."""
    alpha = 1 - sigma
    variance = alpha**2 * SPREAD**2 + sigma**2
    scores = torch.stack([-((x - alpha * mean) ** 2) / (2 * variance) for mean in MEANS])
    modes = torch.stack([-mean + (x - alpha * mean) * (sigma - alpha * SPREAD**2) / variance for mean in MEANS])
    return (torch.softmax(scores, dim=0) * modes).sum(dim=0)


def learned_bias(x: Tensor, target: Tensor, sigma: float) -> float:
    """Relative rms distance between the mean target in each bin of x and the true field's mean there."""
    true = field(x, torch.tensor(sigma, dtype=x.dtype))
    edges = torch.quantile(x[:: max(1, len(x) // 100_000)], torch.linspace(0, 1, BINS + 1, dtype=x.dtype)[1:-1])
    which = torch.bucketize(x, edges)
    count = torch.zeros(BINS, dtype=x.dtype).index_add_(0, which, torch.ones_like(x))
    error = torch.zeros(BINS, dtype=x.dtype).index_add_(0, which, target - true) / count
    return float(((error.square() * count).sum() / count.sum()).sqrt() / true.square().mean().sqrt())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(arguments.seed)
    shape = (arguments.samples,)
    mode = torch.randint(2, shape, generator=generator)
    means = torch.tensor(MEANS, dtype=torch.float64)
    data = means[mode] + SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    print(f"{arguments.samples} pairs, {BINS} bins; relative rms error of the learned velocity")
    print("source σ  offset  unchanged  to_data  no rollout")
    for source in (0.6, 0.3):
        for offset in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
            end = source - offset
            start = interpolate(data, noise, torch.full(shape, source, dtype=torch.float64))
            nodes = torch.linspace(source, end, 9, dtype=torch.float64)[None]
            arrived = integrate(lambda x, s: field(x, s[0]), start[None], nodes, sampler="unipc", order=2)[0]
            plain = interpolate(data, noise, torch.full(shape, end, dtype=torch.float64))
            columns = (
                learned_bias(arrived, velocity(data, noise), end),
                learned_bias(arrived, (arrived - data) / end, end),
                learned_bias(plain, velocity(data, noise), end),
            )
            print(f"{source:8.1f} {offset:7.3f} " + " ".join(f"{100 * value:9.1f}%" for value in columns))


if __name__ == "__main__":
    main()
