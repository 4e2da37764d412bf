"""CREPA in one run: what the interceptor and the regularizer share, and the regularizer itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hooktuner.context import Run
from hooktuner.errors import ModelError
from hooktuner.randomness import derive_seed
from hooktuner.step import Step, StepResult
from hooktuner.technique import Regularizer
from torch import Tensor, nn

from hooktuner_crepa import NAME
from hooktuner_crepa.capture import Capture, Observer, StepNotes
from hooktuner_crepa.loss import Alignment, Neighbours, Teacher, alignment, backbone_teacher, encoder_teacher
from hooktuner_crepa.options import CrepaOptions
from hooktuner_crepa.schedule import Guard, scheduled_weight

FEATURES = f"{NAME}/patches"
"""Where the cached features are in `Batch.features`: (B, F, patch rows, patch columns, E)."""
SIMILARITY = "similarity"
"""The metric that the guard watches: the mean cosine with the own frame's features."""


class Session:
    """Of one run and one denoiser. `total` is the number of optimizer steps.

    Errors: `ModelError` for a block that the denoiser does not have.
    """

    def __init__(self, run: Run, options: CrepaOptions, model: nn.Module) -> None:
        assert run.anatomy is not None
        self.run = run
        self.model = model
        self.options = options
        self.total = run.config.max_train_steps or 0
        self.guard = Guard(options)
        teacher = options.crepa_teacher_block_index if options.source == "backbone" else None
        self.student_block = options.crepa_block_index
        self.teacher_block = teacher
        _check_block(run, model, "crepa_block_index", self.student_block)
        if teacher is not None:
            _check_block(run, model, "crepa_teacher_block_index", teacher)
        self.width = run.anatomy.width(model)
        blocks = [self.student_block] if teacher is None else [self.student_block, teacher]
        self.observer = Observer(blocks, self.decide)
        self._weights: dict[tuple[int, torch.device], Tensor] = {}

    def decide(self, step: Step) -> StepNotes | None:
        """Notes for a step in which hidden states are needed, else None."""
        weight = scheduled_weight(self.options, step.number, self.total)
        if weight == 0:
            return None
        if self.guard.open(step.number):
            return StepNotes(weight)
        return StepNotes(0.0) if self.guard.measures_when_closed else None

    def finished(self, result: StepResult) -> None:
        """Give the guard the similarity of a finished step."""
        similarity = result.metrics.get(f"{NAME}/{SIMILARITY}")
        if similarity is not None:
            self.guard.arrived(result.number, similarity)

    def neighbour_weights(self, frames: int, device: torch.device) -> Tensor:
        """w_fk on the device; made once."""
        key = frames, device
        if key not in self._weights:
            options = self.options
            neighbours = Neighbours(
                options.crepa_adjacent_distance, options.crepa_adjacent_tau, options.crepa_cumulative_neighbors
            )
            self._weights[key] = neighbours.weights(frames).to(device)
        return self._weights[key]


class CrepaRegularizer(Regularizer):
    """The term −λ·A, the projector, and the guard's state."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._projector = make_projector(session)

    def modules(self) -> Mapping[str, nn.Module]:
        """The projector."""
        return {"projector": self._projector}

    def terms(self, step: Step) -> Mapping[str, Tensor]:
        """`loss/crepa`; 0 in steps in which CREPA is off."""
        notes: StepNotes | None = step.notes.get(NAME)
        if notes is None:
            return {"": step.target_BCFHW.new_zeros(())}
        with torch.set_grad_enabled(notes.weight > 0):
            found = self._alignment(step, notes)
        total, own = found.total_B.mean(), found.own_B.mean().detach()
        notes.metrics = {SIMILARITY: own, "neighbours": total.detach() - own, "weight": own.new_full((), notes.weight)}
        return {"": -notes.weight * total if notes.weight > 0 else total.new_zeros(())}

    def metrics(self, step: Step) -> Mapping[str, Tensor]:
        """`crepa/similarity` (mean cosine with the own frame), `crepa/neighbours` (what neighbours add to it) and
        `crepa/weight` (λ of the step); none in steps in which nothing is measured."""
        notes: StepNotes | None = step.notes.get(NAME)
        return {} if notes is None else notes.metrics

    def state(self) -> Mapping[str, Any]:
        """The guard's."""
        return self._session.guard.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self._session.guard.restore(state)

    # --------------------------------------------------------------------------------------------------- helpers

    def _alignment(self, step: Step, notes: StepNotes) -> Alignment:
        """Of all samples of the micro-batch, from the captures of its denoiser calls."""
        students = notes.captures.get(self._session.student_block, [])
        deeper = self._session.teacher_block
        teachers = students if deeper is None else notes.captures.get(deeper, [])
        if sum(len(student.rows) for student in students) != len(step.batch.index) or len(students) != len(teachers):
            raise ModelError(
                f"crepa — block {self._session.student_block} or the teacher's was not called once for every sample of "
                f"step {step.number}; the model or another plugin leaves blocks out. Choose another crepa_block_index."
            )
        parts = [self._align_call(step, student, teacher) for student, teacher in zip(students, teachers, strict=True)]
        return Alignment(torch.cat([part.total_B for part in parts]), torch.cat([part.own_B for part in parts]))

    def _align_call(self, step: Step, student: Capture, deeper: Capture) -> Alignment:
        options = self._session.options
        teacher = self._teacher(step, student, deeper)
        return alignment(
            self._projector(student.tokens_BKD.float()),
            teacher,
            self._session.neighbour_weights(student.grid.frames, teacher.unit_BFPE.device),
            places_BK=student.places_BK,
            counted_BF=_counted(step, student),
            spatial=options.crepa_spatial_align,
            normalize_sum=options.crepa_normalize_neighbour_sum,
            mean_over_frames=options.crepa_normalize_by_frames,
        )

    def _teacher(self, step: Step, student: Capture, deeper: Capture) -> Teacher:
        if self._session.teacher_block is not None:
            return backbone_teacher(deeper.tokens_BKD, deeper.places_BK, student.grid)
        features_BFRCE = step.batch.features[FEATURES]
        if features_BFRCE.shape[1] != student.grid.frames:
            raise ModelError(
                f"crepa — the model's tokens have {student.grid.frames} frames and the latents "
                f"{features_BFRCE.shape[1]}: which features belong to which tokens is not known. CREPA cannot be used "
                "with this model."
            )
        if len(student.rows) < features_BFRCE.shape[0] or list(student.rows) != list(range(len(student.rows))):
            features_BFRCE = features_BFRCE[list(student.rows)]
        with torch.no_grad():
            return encoder_teacher(features_BFRCE, student.grid)


def make_projector(session: Session) -> nn.Module:
    """LayerNorm and Linear from the model's width to the teacher's, float32. Its initial values are a function of the
    run's seed."""
    if session.teacher_block is not None:
        width = session.width
    else:
        from hooktuner_crepa.encoder import feature_width

        width = feature_width(session.options.crepa_encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(session.run.config.seed, "crepa-projector"))
        return nn.Sequential(nn.LayerNorm(session.width), nn.Linear(session.width, width))


def _counted(step: Step, student: Capture) -> Tensor | None:
    """(b, F), False for frames that are wholly given to the model: there is nothing to learn about them. They remain
    teachers of their neighbours."""
    if step.conditioning is None:
        return None
    given = step.conditioning.given_B1FHW
    given_BF = given.flatten(3).all(-1)[:, 0].expand(len(step.batch.index), student.grid.frames)
    return ~given_BF[list(student.rows)]


def _check_block(run: Run, model: nn.Module, key: str, index: int) -> None:
    assert run.anatomy is not None
    assert run.card is not None
    count = len(run.anatomy.blocks(model))
    if index >= count:
        usual = f" Around a quarter of the depth is usual: {max(1, round(count / 4))}." if count > 4 else ""
        raise ModelError(
            f"{key} — there is no block {index}: {run.card.name} {run.flavour.name} has {count} blocks, 0 to "
            f"{count - 1}. Choose one of them.{usual}"
        )
