"""The config keys of CREPA. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from hooktuner.config import Flag, PluginOptions
from hooktuner.context import Run
from hooktuner.errors import Problem, did_you_mean
from pydantic import Field

ENCODERS: Mapping[str, str] = {
    "dinov2_vitg14": "facebook/dinov2-giant",
    "dinov2_vitl14": "facebook/dinov2-large",
    "dinov2_vitb14": "facebook/dinov2-base",
    "dinov2_vits14": "facebook/dinov2-small",
}
"""Names that users know, and the hub repositories of the same weights for transformers."""
TINY = "tiny"
"""The encoder with random weights that is built offline, for tests."""


class CrepaOptions(PluginOptions):
    """Options of `crepa`.

    `crepa_encoder_frames_batch_size` is not in the cache key: it changes the order of the work, not what is computed.
    """

    cache_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "features": (
            "crepa_encoder",
            "crepa_encoder_image_size",
            "crepa_frame_map",
            "crepa_feature_source",
            "crepa_use_backbone_features",
        )
    }

    crepa_enabled: Flag | None = Field(default=None, description="Switches the plugin on or off.")
    crepa_block_index: int = Field(
        8, ge=0, description="The block whose output is aligned, counted from 0: index 8 is the output of the ninth."
    )
    crepa_lambda: float = Field(0.5, ge=0, description="Weight of the alignment term; 0 changes nothing.")
    crepa_adjacent_distance: int = Field(
        1, ge=0, description="Distance in latent frames of the neighbours whose features count too; 0: none."
    )
    crepa_adjacent_tau: float = Field(
        1.0, gt=0, description="A neighbour k latent frames away weighs exp(-k / tau) beside the frame's own 1."
    )
    crepa_cumulative_neighbors: Flag = Field(
        False, description="Use all neighbours up to `crepa_adjacent_distance`, not only those exactly that far away."
    )
    crepa_normalize_by_frames: Flag = Field(
        True, description="Average over frames; `false` sums over them, so the weight grows with the clip's length."
    )
    crepa_normalize_neighbour_sum: Flag = Field(
        False, description="Divide each frame's sum by its weights, which makes lambda independent of distance and tau."
    )
    crepa_spatial_align: Flag = Field(
        True,
        description="Compare place by place, on the model's own token grid; `false` compares means over frames.",
    )
    crepa_encoder: str = Field(
        "dinov2_vitg14",
        description="The vision encoder: dinov2_vitg14, dinov2_vitl14, dinov2_vitb14, dinov2_vits14, a hub id or a "
        "folder of a DINOv2 for transformers (with or without registers), or `tiny` (random weights, for tests).",
    )
    crepa_encoder_image_size: int = Field(
        518,
        ge=14,
        description="Size of the encoder's input: edge in pixels of a square of the same area. Frames keep their "
        "aspect ratio; each side is rounded to whole patches.",
    )
    crepa_encoder_frames_batch_size: int = Field(
        8, ge=-1, description="Frames that go through the encoder at a time while caching; -1: all of a clip."
    )
    crepa_drop_vae_encoder: Flag = Field(
        False,
        description="Neither the VAE nor the vision encoder is in memory while training, with either value: that is "
        "how hooktuner always works. `true` says so in the report.",
    )
    crepa_frame_map: Literal["center", "last", "mean"] = Field(
        "center",
        description="Which pixel frame stands for a latent frame: the `center` or the `last` one of those that it "
        "encodes, or the `mean` of the features of all of them (encodes every frame).",
    )
    crepa_scheduler: Literal["constant", "linear", "cosine", "polynomial"] = Field(
        "constant", description="How the weight goes from `crepa_lambda` to `crepa_lambda_end`, after the warm-up."
    )
    crepa_warmup_steps: int = Field(0, ge=0, description="Steps over which the weight rises linearly from 0.")
    crepa_decay_steps: int = Field(
        0, ge=0, description="Steps after the warm-up that the scheduler takes; 0: all that are left of the run."
    )
    crepa_lambda_end: float = Field(0.0, ge=0, description="The weight at the end of the scheduler.")
    crepa_power: float = Field(1.0, gt=0, description="Exponent of the polynomial scheduler.")
    crepa_cutoff_step: int = Field(0, ge=0, description="The last step with CREPA; 0: it stays on.")
    crepa_similarity_threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Switch CREPA off once the running mean of the cosine with the own frame's features reaches this.",
    )
    crepa_similarity_ema_decay: float = Field(
        0.99, ge=0, lt=1, description="Decay per step of that running mean; 0: the last value alone."
    )
    crepa_threshold_mode: Literal["permanent", "recoverable"] = Field(
        "permanent",
        description="After the threshold: off for good, or on again when the running mean falls below it.",
    )
    crepa_feature_source: Literal["encoder", "backbone"] = Field(
        "encoder",
        description="The teacher: features of the vision encoder, or the detached output of a deeper block of the "
        "model in the same pass.",
    )
    crepa_use_backbone_features: Flag = Field(
        False, description="Older spelling of `crepa_feature_source`: `backbone`."
    )
    crepa_teacher_block_index: int | None = Field(
        None, ge=0, description="The deeper block that is the teacher with `backbone`, counted from 0."
    )

    def active(self) -> bool | None:
        """What the user says with `crepa_enabled`."""
        return self.crepa_enabled

    @property
    def source(self) -> Literal["encoder", "backbone"]:
        """The teacher, whichever way it was spelt."""
        return "backbone" if self.crepa_use_backbone_features else self.crepa_feature_source

    @property
    def inert(self) -> bool:
        """Whether the weight is 0 in every step."""
        return self.crepa_lambda == 0 and (self.crepa_scheduler == "constant" or self.crepa_lambda_end == 0)

    def problems(self, run: Run) -> Iterable[Problem]:
        """What does not fit together."""
        yield from self._teacher_problems()
        if self.crepa_encoder_frames_batch_size == 0:
            yield Problem("crepa_encoder_frames_batch_size", "0 frames are no batch", "Use 1 or more, or -1 for all.")
        if self.source == "encoder" and (problem := encoder_problem(self.crepa_encoder)):
            yield problem

    def _teacher_problems(self) -> Iterable[Problem]:
        named = self.crepa_feature_source if "crepa_feature_source" in self.model_fields_set else None
        if self.crepa_use_backbone_features and named == "encoder":
            yield Problem(
                "crepa_use_backbone_features",
                'is true while crepa_feature_source is "encoder": two teachers are named',
                "Remove one of the two.",
            )
            return
        index, teacher = self.crepa_block_index, self.crepa_teacher_block_index
        if self.source == "encoder" and teacher is not None:
            yield Problem(
                "crepa_teacher_block_index",
                "the teacher is the vision encoder, not a block",
                'Remove it, or set "crepa_feature_source": "backbone".',
            )
        if self.source == "backbone" and teacher is None:
            yield Problem(
                "crepa_teacher_block_index",
                "is missing: with backbone features a deeper block is the teacher",
                f"Set it to a block after crepa_block_index ({index}).",
            )
        if self.source == "backbone" and teacher is not None and teacher <= index:
            yield Problem(
                "crepa_teacher_block_index",
                f"block {teacher} is not deeper than crepa_block_index ({index})",
                "Choose a deeper block as the teacher.",
            )

    def notes(self) -> Iterable[str]:
        """Sentences for the start report."""
        if self.inert:
            yield "crepa_lambda is 0 in every step: CREPA changes nothing."
        if self.crepa_drop_vae_encoder:
            yield (
                "crepa_drop_vae_encoder: the teacher's features are cached from the clips' own frames, so neither the "
                "VAE nor the vision encoder is in memory while training, with or without this key."
            )
        written = self.model_fields_set
        for key in ("crepa_decay_steps", "crepa_lambda_end"):
            if key in written and self.crepa_scheduler == "constant":
                yield f"{key} has no effect: crepa_scheduler is constant."
        if "crepa_power" in written and self.crepa_scheduler != "polynomial":
            yield "crepa_power has no effect: crepa_scheduler is not polynomial."
        for key in ("crepa_similarity_ema_decay", "crepa_threshold_mode"):
            if key in written and self.crepa_similarity_threshold is None:
                yield f"{key} has no effect: crepa_similarity_threshold is not set."
        if self.source == "backbone":
            for key in ("encoder", "encoder_image_size", "encoder_frames_batch_size", "frame_map"):
                if f"crepa_{key}" in written:
                    yield f"crepa_{key} has no effect: the teacher is a block of the model."


def encoder_problem(encoder: str) -> Problem | None:
    """Why `encoder` cannot be the name, hub id or folder of an encoder, as far as can be said without loading it."""
    if encoder in ENCODERS or encoder == TINY:
        return None
    if encoder.startswith(("/", ".", "~")):
        if (Path(encoder).expanduser() / "config.json").is_file():
            return None
        return Problem("crepa_encoder", f"{encoder} is not a folder with a config.json", "Correct the path.")
    if encoder.count("/") == 1 and all(encoder.split("/")):
        return None
    names = [*ENCODERS, TINY]
    return Problem(
        "crepa_encoder",
        f'there is no encoder "{encoder}"',
        f"{did_you_mean(encoder, names)} Known: {', '.join(names)}; or give a hub id (owner/name) or a folder.".strip(),
    )
