"""The config models: `RunConfig`, the keys that core owns, and `PluginOptions`, the base of those that plugins own.

All keys live side by side in one flat JSON object. Values are checked strictly but read kindly: `"true"` and
`"false"` are booleans, `"16"` is a number. Keys whose default is `None` and whose description says "family default"
are filled from the model card. `draft.py` reads files and flags, `assemble.py` puts everything together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from hooktuner.errors import ConfigError, Problem

if TYPE_CHECKING:
    from hooktuner.context import Run


_STRICT = ConfigDict(
    extra="forbid",
    frozen=True,
    validate_default=True,
    allow_inf_nan=False,
    coerce_numbers_to_str=True,
    protected_namespaces=(),
)


def _as_bool(value: object) -> object:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return value


def _as_names(value: object) -> object:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


Flag = Annotated[bool, BeforeValidator(_as_bool)]
"""A boolean that may be written as the string "true" or "false"."""


class PluginOptions(BaseModel):
    """Base of a plugin's options. Each field is a flat config key; describe it, with its unit.

    `cache_fields` names the fields on which cached `text`, `latents` or `features` depend; they join the cache key.
    """

    model_config = _STRICT
    cache_fields: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def active(self) -> bool | None:
        """Whether these values switch the plugin on (True), say explicitly that it is off (False), or neither (None).

        Asked of plugins whose keys occur in the config. A switch is explicit: its default must be None, and False
        must come from a value that the user wrote. Families and plugins without a switch keep None.
        """
        return None

    def problems(self, run: Run) -> Iterable[Problem]:
        """What does not fit together, asked before anything is loaded. `run.card` and `run.config` are complete."""
        return ()


class RunConfig(BaseModel):
    """Every config key that core owns."""

    model_config = _STRICT

    # ------------------------------------------------------------------------------------------------- identity
    model_family: str | None = Field(
        default=None, description="The model family: the name of a family plugin, or an alias."
    )
    model_flavour: str | None = Field(
        default=None, description="Which released checkpoint of the family; family default."
    )
    model_type: Literal["lora", "full"] = Field(default="lora", description="Train a low-rank adapter, or all weights.")
    pretrained_model_name_or_path: str | None = Field(
        default=None, description="Hub id or folder of the checkpoint in the diffusers layout; default: the flavour's."
    )
    plugins: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = Field(
        default=(), description="Further plugins to activate, in this order: a list, or names separated by commas."
    )
    output_dir: str = Field(
        default="output", description="The run folder: config, metrics, checkpoints, validation media."
    )
    cache_dir: str | None = Field(
        default=None, description="Where encoded captions and clips are kept; default: `cache` beside the run folder."
    )
    seed: int = Field(default=42, ge=0, description="Everything random is a function of this number.")
    data_backend_config: str | None = Field(default=None, description="Path of the datasets file (a JSON list).")

    # ------------------------------------------------------------------------------------------------- data
    resolution: float = Field(
        default=512,
        gt=0,
        description="Default size of clips for datasets without their own, in the unit of `resolution_type`.",
    )
    resolution_type: Literal["pixel", "area", "pixel_area"] = Field(
        default="pixel_area",
        description="What `resolution` means: `pixel` = shorter edge in pixels, `area` = megapixels, "
        "`pixel_area` = edge in pixels of a square of the same area.",
    )
    frame_rate: float | None = Field(
        default=None, gt=0, description="Frames per second of training clips and validation videos; family default."
    )
    caption_strategy: Literal["textfile", "filename", "instanceprompt"] | None = Field(
        default=None, description="Default caption source for datasets without their own."
    )
    caption_dropout_probability: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of samples that are trained with the empty caption (needed for guidance).",
    )
    vae_batch_size: int = Field(default=1, ge=1, description="Clips encoded at a time while caching.")
    offload_during_startup: Flag = Field(
        default=True,
        description="Never hold the VAE and a text encoder on the device together while caching. This is how hooktuner "
        "always works; `false` is refused.",
    )

    # ------------------------------------------------------------------------------------------------- steps
    train_batch_size: int = Field(default=1, ge=1, description="Samples per micro-batch and process.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Micro-batches per optimizer step and process."
    )
    max_train_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps to train; this or num_train_epochs."
    )
    num_train_epochs: int | None = Field(
        default=None, ge=1, description="Passes over all samples; this or max_train_steps."
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        default="bf16",
        description="`bf16`: bfloat16 arithmetic (frozen weights are stored in bfloat16, trained ones in float32); "
        "`no`: float32.",
    )
    gradient_checkpointing: Flag = Field(
        default=True,
        description="Recompute transformer blocks in the backward pass instead of keeping their activations.",
    )
    gradient_checkpointing_interval: int = Field(
        default=1, ge=1, description="Recompute every n-th block only (1 = every block): more memory, less time."
    )

    # ------------------------------------------------------------------------------------------------- optimizer
    optimizer: Literal["adamw", "torch-adamw"] = Field(default="adamw", description="The optimizer.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"
    ] = Field(default="constant_with_warmup", description="Shape of the learning rate over the run, after the warm-up.")
    lr_warmup_steps: int = Field(
        default=0, ge=0, description="Steps over which the learning rate rises linearly from 0."
    )
    lr_num_cycles: int = Field(default=1, ge=1, description="Cycles of cosine_with_restarts and sine.")
    lr_power: float = Field(default=1.0, gt=0, description="Exponent of the polynomial schedule.")
    lr_end: float = Field(default=0.0, ge=0, description="Learning rate at the end of linear, cosine and polynomial.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW: decay of the first moment.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW: decay of the second moment.")
    adam_weight_decay: float = Field(default=0.01, ge=0, description="AdamW: decoupled weight decay.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW: added to the denominator.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip gradients to this; 0 switches clipping off.")
    grad_clip_method: Literal["norm", "value"] = Field(
        default="norm", description="Clip the global norm, or each element, to `max_grad_norm`."
    )

    # ------------------------------------------------------------------------------------------------- adapter
    lora_rank: int = Field(default=16, ge=1, description="Rank of the adapter.")
    lora_alpha: float | None = Field(
        default=None, gt=0, description="Scale numerator; the adapter is scaled by alpha / rank; default: the rank."
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")

    # ------------------------------------------------------------------------------------------------- flow
    flow_schedule_shift: float | None = Field(
        default=None, gt=0, description="Shift of the training noise levels, s·σ/(1+(s−1)·σ); family default."
    )
    flow_sigmoid_scale: float = Field(default=1.0, gt=0, description="σ = sigmoid(scale · N(0,1)) before the shift.")
    flow_use_uniform_schedule: Flag = Field(default=False, description="Draw σ uniformly before the shift.")
    flow_use_beta_schedule: Flag = Field(default=False, description="Draw σ from a Beta law before the shift.")
    flow_beta_schedule_alpha: float = Field(default=2.0, gt=0, description="First parameter of the Beta law.")
    flow_beta_schedule_beta: float = Field(default=2.0, gt=0, description="Second parameter of the Beta law.")

    # ------------------------------------------------------------------------------------------------- checkpoints
    checkpoint_step_interval: int = Field(
        default=500, ge=1, description="Save a checkpoint every so many steps, and at the end."
    )
    checkpoints_total_limit: int = Field(default=5, ge=0, description="Keep at most so many checkpoints; 0 keeps all.")
    resume_from_checkpoint: str | None = Field(
        default="latest",
        description="`latest` (the newest checkpoint of the run folder, a fresh start where there is none), the path "
        "of a checkpoint, its name in the run folder, or `none`.",
    )

    # ------------------------------------------------------------------------------------------------- validation
    validation_disable: Flag = Field(default=False, description="Do not make validation media.")
    validation_prompt: str | None = Field(default=None, description="A prompt to sample at each validation.")
    user_prompt_library: str | None = Field(
        default=None, description="Path of a JSON object, nickname → prompt; each is sampled at each validation."
    )
    validation_negative_prompt: str | None = Field(
        default=None, description="Negative prompt for guidance; family default."
    )
    validation_step_interval: int = Field(
        default=100, ge=1, description="Validate every so many steps, and at the end."
    )
    validation_at_start: Flag = Field(default=False, description="Also validate before the first step.")
    validation_resolution: str | None = Field(
        default=None,
        description="`WIDTHxHEIGHT` in pixels (or one number for a square); several separated by commas; family "
        "default.",
    )
    validation_num_video_frames: int | None = Field(
        default=None, ge=1, description="Frames of validation videos; family default."
    )
    validation_num_inference_steps: int = Field(default=30, ge=1, description="Sampling steps.")
    validation_guidance: float | None = Field(
        default=None, ge=0, description="Classifier-free guidance scale; family default."
    )
    validation_seed: int | None = Field(default=None, ge=0, description="Seed of validation noise; default: `seed`.")
    validation_using_datasets: Flag = Field(
        default=False, description="Take first frames for validation from the dataset `eval_dataset_id`."
    )
    eval_dataset_id: str | None = Field(
        default=None, description="The id of the dataset that `validation_using_datasets` uses."
    )

    # ------------------------------------------------------------------------------------------------- reporting
    report_to: Literal["none", "tensorboard"] = Field(default="none", description="Tracker besides `metrics.jsonl`.")
    tracker_project_name: str = Field(default="hooktuner", description="Project name for the tracker.")
    tracker_run_name: str | None = Field(
        default=None, description="Run name for the tracker; default: the run folder's name."
    )

    def validation_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of each validation sample, from `validation_resolution`.

        Errors: `ValueError` with a sentence that says what is wrong.
        """
        return tuple(_size(part) for part in (self.validation_resolution or "").split(",") if part.strip())

    def prompts(self) -> dict[str, str]:
        """Validation prompts by nickname: `validation_prompt` as `validation`, then the prompt library.

        Errors: `ConfigError` for a library that cannot be used.
        """
        prompts = {} if self.validation_prompt is None else {"validation": self.validation_prompt}
        return {**prompts, **(prompt_library(Path(self.user_prompt_library)) if self.user_prompt_library else {})}


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX×]\s*(\d+)\s*)?", text)
    if match is None or int(match[1]) == 0 or (match[2] is not None and int(match[2]) == 0):
        raise ValueError(f'"{text.strip()}" is not a size; write WIDTHxHEIGHT in pixels, such as 512x768')
    return int(match[1]), int(match[2] or match[1])


def prompt_library(path: Path) -> dict[str, str]:
    """Read a prompt library: a JSON object, nickname → prompt.

    Errors: `ConfigError` for a file that is missing, not JSON, or holds anything but text.
    """
    try:
        library = json.loads(path.expanduser().read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as failure:
        where = f"{path}: line {failure.lineno}, column {failure.colno}"
        raise ConfigError(
            Problem(where, "the prompt library is not JSON", "JSON has no comments and no comma after the last entry.")
        ) from None
    except (OSError, UnicodeDecodeError) as failure:
        why = failure.strerror or str(failure) if isinstance(failure, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            Problem(str(path), f"the prompt library cannot be read: {why}", "Correct user_prompt_library.")
        ) from None
    form = 'Write {"nickname": "prompt", …}.'
    if not isinstance(library, dict):
        raise ConfigError(Problem(str(path), "a prompt library is one JSON object", form))
    wrong = [
        Problem(f"{path}: {name}", "a prompt is text", form) for name, text in library.items() if type(text) is not str
    ]
    if wrong:
        raise ConfigError(wrong)
    return library


ALIASES: Mapping[str, str] = {
    "framerate": "frame_rate",
    "checkpointing_steps": "checkpoint_step_interval",
    "validation_steps": "validation_step_interval",
    "validation_on_startup": "validation_at_start",
}
"""Other spellings of core's keys that existing configs use."""

FAMILY_DEFAULTS: tuple[str, ...] = tuple(
    name for name, field in RunConfig.model_fields.items() if (field.description or "").endswith("family default.")
)
"""Keys that the model card fills where the user left them out."""
