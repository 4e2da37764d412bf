"""Compose a hook of your own with an installed family: a loss that counts noisy samples less."""

from __future__ import annotations

import sys

import hooktuner
from hooktuner import flow


class GentleLoss:
    """Weights each sample's loss with 1 − σ/2, so that almost pure noise pulls less."""

    @hooktuner.hookimpl
    def compute_loss(self, run, step):
        loss_B = flow.mean_squared_error(step.prediction_BCFHW, step.target_BCFHW, step.weight_B1FHW)
        return loss_B * (1 - step.sigma_B / 2)


def main(config: str) -> None:
    result = hooktuner.run(config, plugins=["kandinsky5-video", GentleLoss])
    print(f"{result.reason} after {result.steps} steps: {result.checkpoint}")


if __name__ == "__main__":
    main(sys.argv[1])
