"""The alignment of projected hidden states with teacher features across frames, as pure functions of tensors.

For sample b, frame f and place p of the token grid, with student s, teacher y, K(f) = {f ± d} inside the clip:

    A_bfp = Σ_{k ∈ {f} ∪ K(f)} w_fk · cos(y_bkp, s_bfp),      w_fk = exp(−|k − f| / τ)

and the loss is −λ times the mean of A over places, frames and samples. This is the objective of CREPA
(cross-frame representation alignment, Hwang et al. 2025) with the mean over frames that REPA uses where the paper
sums. A neighbour outside the clip contributes nothing; the student frame is pulled to its neighbours' teachers, never
the other way round. Because cosines are linear in the unit teacher, A is one dot product with Σ_k w_fk·ŷ_bkp.

Shapes: legend in `hooktuner.family`, and P = rows·columns places of the student's grid, E = the teacher's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hooktuner.family import Grid
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Neighbours:
    """Which frames count for a frame, and how much. `distance` d and `tau` τ in latent frames."""

    distance: int = 1
    tau: float = 1.0
    cumulative: bool = False

    def weights(self, frames: int) -> Tensor:
        """w_fk as a matrix (F, F) with ones on the diagonal, float32. Where d ≥ F there are no neighbours."""
        distances = range(1, self.distance + 1) if self.cumulative else range(self.distance, self.distance + 1)
        weights_FF = torch.eye(frames)
        for distance in distances:
            if 0 < distance < frames:
                band = torch.full((frames - distance,), math.exp(-distance / self.tau))
                weights_FF = weights_FF + band.diag(distance) + band.diag(-distance)
        return weights_FF


@dataclass(frozen=True)
class Teacher:
    """Unit features on the student's grid: unit_BFPE, and present_BFP, 1 where there are features and 0 elsewhere."""

    unit_BFPE: Tensor
    present_BFP: Tensor


@dataclass(frozen=True)
class Alignment:
    """Per sample: the weighted sum A over all frames of a clip's neighbourhood, and its part from the own frame."""

    total_B: Tensor
    own_B: Tensor


def encoder_teacher(features_BFRCE: Tensor, grid: Grid) -> Teacher:
    """Cached features (B, F, patch rows, patch columns, E) on the student's grid, in float32.

    Resampled in two dimensions, bilinear with antialiasing, and then scaled to length 1; never along the raster order.
    """
    frames = features_BFRCE.flatten(0, 1).float()
    if frames.shape[1:3] != (grid.rows, grid.columns):
        frames = F.interpolate(
            frames.permute(0, 3, 1, 2), (grid.rows, grid.columns), mode="bilinear", align_corners=False, antialias=True
        ).permute(0, 2, 3, 1)
    unit = F.normalize(frames, dim=-1).flatten(1, 2).unflatten(0, features_BFRCE.shape[:2])
    return Teacher(unit, torch.ones_like(unit[..., 0]))


def backbone_teacher(tokens_BKD: Tensor, places_BK: Tensor | None, grid: Grid) -> Teacher:
    """Detached block outputs on their grid. Places whose token was routed around are not present."""
    unit = F.normalize(tokens_BKD.detach().float(), dim=-1)
    batch, _, width = unit.shape
    places = grid.rows * grid.columns
    present = unit.new_ones(unit.shape[:2])
    if places_BK is not None:
        whole = unit.new_zeros(batch, grid.frames * places, width)
        present = present.new_zeros(batch, grid.frames * places).scatter(1, places_BK, present)
        unit = whole.scatter(1, places_BK[..., None].expand(-1, -1, width), unit)
    return Teacher(unit.unflatten(1, (grid.frames, places)), present.unflatten(1, (grid.frames, places)))


def alignment(
    student_BKE: Tensor,
    teacher: Teacher,
    weights_FF: Tensor,
    *,
    places_BK: Tensor | None = None,
    counted_BF: Tensor | None = None,
    spatial: bool = True,
    normalize_sum: bool = False,
    mean_over_frames: bool = True,
) -> Alignment:
    """How well the projected tokens `student_BKE` (float32) agree with the teacher, per sample.

    places_BK: the place f·P + p of each token; None: all tokens, in order. counted_BF: False for frames that are left
    out; None: all count. Frames of which no token is there are left out too, and within a frame the tokens that are
    there are averaged, so routing does not shift weight between frames.
    spatial: compare place by place; else means over the places of each frame. normalize_sum: divide by Σ_k w_fk of
    the teachers that are there. mean_over_frames: else the sum over frames (F times the mean).
    """
    frames, places = teacher.unit_BFPE.shape[1:3]
    if places_BK is None:
        tokens = torch.arange(frames * places, device=student_BKE.device)
        frame_BK = (tokens // places).expand(student_BKE.shape[0], -1)
    else:
        frame_BK = places_BK // places
    share_BFK = _shares(frame_BK, frames)
    if not spatial:
        student_BKE = share_BFK @ student_BKE
        mean_BFE = (teacher.unit_BFPE * teacher.present_BFP[..., None]).sum(2)
        teacher = Teacher(F.normalize(mean_BFE, dim=-1)[:, :, None], teacher.present_BFP.amax(2, keepdim=True))
        places_BK = None
        here_BF = (share_BFK.sum(2) > 0).float()
        share_BFK = torch.diag_embed(here_BF)
    weight_BK = _token_weights(share_BFK, counted_BF, mean_over_frames)

    unit_BKE = F.normalize(student_BKE, dim=-1)
    blended_BKE = _pick(_blend(weights_FF, teacher.unit_BFPE.flatten(2)).view_as(teacher.unit_BFPE), places_BK)
    agreement_BK = (unit_BKE * blended_BKE).sum(-1)
    if normalize_sum:
        sum_BFP = _blend(weights_FF, teacher.present_BFP)
        agreement_BK = agreement_BK / _pick(sum_BFP[..., None], places_BK)[..., 0].clamp_min(1e-6)
    own_BK = (unit_BKE.detach() * _pick(teacher.unit_BFPE, places_BK)).sum(-1)
    return Alignment((agreement_BK * weight_BK).sum(1), (own_BK * weight_BK).sum(1))


def _shares(frame_BK: Tensor, frames: int) -> Tensor:
    """(B, F, K): 1 / (number of the frame's tokens) where the token is in the frame, else 0."""
    inside = (frame_BK[:, None] == torch.arange(frames, device=frame_BK.device)[:, None]).float()
    return inside / inside.sum(2, keepdim=True).clamp_min(1)


def _token_weights(share_BFK: Tensor, counted_BF: Tensor | None, mean_over_frames: bool) -> Tensor:
    """(B, K): what each token weighs in its sample; sums to 1 (or F), or 0 where nothing counts."""
    here_BF = (share_BFK.sum(2) > 0).float()
    if counted_BF is not None:
        here_BF = here_BF * counted_BF.float()
    frame_BF = here_BF / here_BF.sum(1, keepdim=True).clamp_min(1)
    if not mean_over_frames:
        frame_BF = frame_BF * share_BFK.shape[1]
    return (frame_BF[:, None] @ share_BFK)[:, 0]


def _blend(weights_FF: Tensor, values_BFX: Tensor) -> Tensor:
    """Σ_k w_fk · values_k."""
    return weights_FF @ values_BFX


def _pick(values_BFPE: Tensor, places_BK: Tensor | None) -> Tensor:
    """(B, K, E): the values at the places; None: all, in order."""
    flat = values_BFPE.flatten(1, 2)
    return flat if places_BK is None else flat.gather(1, places_BK[..., None].expand(-1, -1, flat.shape[-1]))
