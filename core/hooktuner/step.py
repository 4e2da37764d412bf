"""What passes between the loader, the kernel and the hooks in one micro-step.

Shapes carry suffixes (legend in `family.py`). Latents are always (B, C, F, H, W), also for images (F = 1).
Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """Encoded samples of one bucket, from the cache, plus the random draws that belong to them.

    `index` holds each sample's global number in the run: all of a sample's randomness is a function of the seed,
    a purpose and this number. `text` holds one mapping per sample, because captions have unequal lengths.
    """

    keys: Sequence[str]
    """Which sample each one is, for people: `dataset/relative path [view]`."""
    index: Sequence[int]
    latents_BCFHW: torch.Tensor
    noise_BCFHW: torch.Tensor
    sigma_B: torch.Tensor
    text: Sequence[Mapping[str, torch.Tensor]]
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What else `encode_latents` cached, stacked over the batch (`first_latent` …)."""
    features: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What `encode_features` cached, stacked over the batch, under `<plugin>/<name>`."""
    pixels: tuple[int, int, int] = (1, 0, 0)
    """Frames, height and width of the clips in pixels."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies do not block."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            keys=self.keys,
            index=self.index,
            latents_BCFHW=move(self.latents_BCFHW),
            noise_BCFHW=move(self.noise_BCFHW),
            sigma_B=move(self.sigma_B),
            text=[{name: move(tensor) for name, tensor in sample.items()} for sample in self.text],
            extras={name: move(tensor) for name, tensor in self.extras.items()},
            features={name: move(tensor) for name, tensor in self.features.items()},
            pixels=self.pixels,
        )


@dataclass(frozen=True)
class Conditioning:
    """Latents that are given to the model and not generated (`condition` hook).

    given_B1FHW: True where the value is given; broadcastable to the latents (usually (B, 1, F, 1, 1)).
    latents_BCFHW: the clean values there; broadcastable to the latents.
    """

    given_B1FHW: torch.Tensor
    latents_BCFHW: torch.Tensor


@dataclass
class Step:
    """One micro-batch on its way through the kernel.

    Written by the kernel alone, in this order: the draw, `conditioning`, `noisy`, `prediction`, `loss_B`.
    Hooks read it and return values; they do not assign to it, except `notes` and, in `predict`, `rows`.
    """

    number: int
    """The optimizer step under way, counted from 1."""
    micro: int
    """Number of the micro-batch in the whole run, over all processes, counted from 0."""
    batch: Batch
    sigma_B: torch.Tensor
    """σ in (0, 1) in float32: 0 is data, 1 is noise."""
    timestep_B: torch.Tensor
    """1000·σ in float32, never rounded."""
    noisy_BCFHW: torch.Tensor
    """x_σ = (1−σ)·x0 + σ·ε, with given latents put in their places; float32."""
    target_BCFHW: torch.Tensor
    """The velocity ε − x0; float32."""
    conditioning: Conditioning | None = None
    rows: Sequence[int] | None = None
    """Positions in the micro-batch of the samples in the denoiser call under way; None: all of them, in order. A
    family that calls its denoiser several times for one micro-batch sets it around each call, so that whatever works
    on block calls can index `batch` and `conditioning` with it."""
    prediction_BCFHW: torch.Tensor | None = None
    loss_B: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    """Where plugins leave what they need again within the step, under their own name."""

    @property
    def weight_B1FHW(self) -> torch.Tensor | None:
        """1 where the loss counts and 0 where latents are given; None where everything counts."""
        if self.conditioning is None:
            return None
        return (~self.conditioning.given_B1FHW).to(self.target_BCFHW.dtype)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `terms` are already scaled by their weights and averaged over the global batch, and
    so are `metrics`, the further numbers of regularizers under `<plugin>/<name>`."""

    number: int
    epoch: int
    loss: float
    terms: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    samples: Sequence[str]
    metrics: Mapping[str, float] = field(default_factory=dict)
