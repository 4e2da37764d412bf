"""What must hold between config keys, and what the user should know: pure functions of a config and a model card."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hooktuner.config import RunConfig, prompt_library
from hooktuner.draft import Draft
from hooktuner.errors import ConfigError, Problem, did_you_mean
from hooktuner.family import Flavour, ModelCard


@dataclass(frozen=True)
class Finding:
    """A problem of one or several keys (dropped where one of them is wrong by itself)."""

    keys: tuple[str, ...]
    why: str
    fix: str = ""

    def problem(self, draft: Draft) -> Problem:
        """The problem with the places where the keys were written."""
        return Problem(draft.where(*self.keys), self.why, self.fix)


@dataclass
class Findings:
    """Collects findings of a config; `bad` keys are not asked about again."""

    draft: Draft
    bad: set[str]
    problems: list[Problem] = field(default_factory=list)

    def add(self, *findings: Finding) -> None:
        """Take findings, less those about keys that are wrong by themselves."""
        self.problems += [finding.problem(self.draft) for finding in findings if not self.bad & set(finding.keys)]


def config_findings(config: RunConfig) -> Iterator[Finding]:
    """What does not fit together, whatever the model."""
    if config.max_train_steps is None and config.num_train_epochs is None:
        yield Finding(
            ("max_train_steps", "num_train_epochs"),
            "neither says how long to train",
            'Set one of them, for example "max_train_steps": 1000.',
        )
    if config.max_train_steps is not None and config.num_train_epochs is not None:
        yield Finding(("max_train_steps", "num_train_epochs"), "both say how long to train", "Remove one of the two.")
    if config.data_backend_config is None:
        yield Finding(("data_backend_config",), "is missing", "Set it to the path of the datasets file (a JSON list).")
    if not config.offload_during_startup:
        yield Finding(
            ("offload_during_startup",),
            "the VAE and the text encoder are never on the device together, because each is loaded, used and released "
            "before the next; there is no other way of caching to switch to",
            "Remove it, or set it to true.",
        )
    if config.flow_use_uniform_schedule and config.flow_use_beta_schedule:
        yield Finding(
            ("flow_use_uniform_schedule", "flow_use_beta_schedule"),
            "noise levels are drawn from one law, and two are chosen",
            "Set one of them to false.",
        )
    if config.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        yield Finding(
            ("report_to",), "tensorboard is not installed", "Install it with: pip install 'hooktuner[tensorboard]'"
        )
    if config.validation_using_datasets and config.eval_dataset_id is None:
        yield Finding(
            ("validation_using_datasets",),
            "does not say which dataset",
            "Set eval_dataset_id to the id of an image dataset.",
        )
    yield from _path_findings(config)


def _path_findings(config: RunConfig) -> Iterator[Finding]:
    if config.output_dir and Path(config.output_dir).is_file():
        yield Finding(("output_dir",), f"{config.output_dir} is a file", "Name a folder; it is made if need be.")
    source = config.pretrained_model_name_or_path
    if source is not None and source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().is_dir():
        yield Finding(
            ("pretrained_model_name_or_path",),
            f"{source} is not a folder",
            "Give a folder in the diffusers layout, or a hub id such as owner/name.",
        )
    if config.user_prompt_library is not None:
        try:
            prompt_library(Path(config.user_prompt_library))
        except ConfigError as error:
            for problem in error.problems:
                yield Finding(("user_prompt_library",), f"{problem.where}: {problem.why}", problem.fix)
    resume = config.resume_from_checkpoint
    if resume is not None and resume not in ("latest", "none"):
        folder = Path(config.output_dir) / "checkpoints"
        if not (Path(resume).expanduser().is_dir() or (folder / resume).is_dir()):
            names = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
            have = f"{folder} has {', '.join(names)}." if names else f"{folder} has no checkpoint."
            yield Finding(
                ("resume_from_checkpoint",),
                f"{resume} is neither a folder nor a checkpoint of this run folder",
                f'{did_you_mean(resume, names)} {have} Or write "latest".'.strip(),
            )


def card_findings(config: RunConfig, card: ModelCard, flavour: Flavour) -> Iterator[Finding]:
    """What does not fit the model. `config` has the family's defaults."""
    latents = card.latents_of(flavour.name)
    try:
        sizes = config.validation_sizes()
    except ValueError as error:
        yield Finding(("validation_resolution",), str(error))
    else:
        if not sizes and config.validation_resolution is not None:
            yield Finding(("validation_resolution",), "names no size", "Write WIDTHxHEIGHT in pixels, such as 512x768.")
    frames = config.validation_num_video_frames
    if card.media == "image" and frames not in (None, 1):
        yield Finding(("validation_num_video_frames",), f"{card.name} makes images, which have 1 frame", "Remove it.")
    elif frames is not None and (why := latents.frames.problem(frames)):
        yield Finding(("validation_num_video_frames",), why)
    if config.validation_using_datasets and "first_frame" not in flavour.conditioning:
        yield Finding(
            ("validation_using_datasets",),
            f'flavour "{flavour.name}" of {card.name} is not conditioned on a first frame, so no images are needed',
            "Remove it, or choose an image-to-video flavour.",
        )


def rounded_resolution(config: RunConfig, multiple: int) -> str | None:
    """`validation_resolution` with every side rounded to the nearest multiple that the model can make."""
    try:
        sizes = config.validation_sizes()
    except ValueError:
        return config.validation_resolution
    sides = [tuple(max(multiple, (side + multiple // 2) // multiple * multiple) for side in size) for size in sizes]
    return ",".join(f"{width}x{height}" for width, height in sides) or config.validation_resolution


def notes(config: RunConfig, card: ModelCard, flavour: Flavour) -> Iterator[str]:
    """What the user should know although nothing is wrong."""
    defaults = card.defaults_of(flavour.name)
    usual = defaults.get("validation_guidance")
    guidance = config.validation_guidance
    if usual and guidance is not None and not config.validation_disable and not 0.4 * usual <= guidance <= 1.2 * usual:
        yield (
            f"validation_guidance {guidance:g} is far from the usual {usual:g} of {card.name}: validation samples may "
            "turn out black or noisy."
        )
    rate = defaults.get("frame_rate")
    if card.media == "video" and rate and config.frame_rate is not None and config.frame_rate != rate:
        yield (
            f"frame_rate {config.frame_rate:g} differs from the {rate:g} frames per second that {card.name} was "
            "trained with: motion may look too fast or too slow."
        )
    horizon = config.lr_scheduler in ("cosine", "sine")  # there a warm-up of the whole run is read as the horizon
    if config.max_train_steps is not None and config.lr_warmup_steps >= config.max_train_steps and not horizon:
        yield (
            f"lr_warmup_steps ({config.lr_warmup_steps}) is not shorter than the run ({config.max_train_steps} steps): "
            "the learning rate never reaches its full value."
        )
    if not config.validation_disable and config.validation_prompt is None and config.user_prompt_library is None:
        yield "There is no validation: neither validation_prompt nor user_prompt_library is set."
    for key, works, otherwise in _EFFECTS:
        if getattr(config, key) != RunConfig.model_fields[key].default and not works(config):
            yield f"{key} has no effect: {otherwise}."


_EFFECTS = (
    ("lora_rank", lambda config: config.model_type == "lora", "model_type is not lora"),
    ("lora_alpha", lambda config: config.model_type == "lora", "model_type is not lora"),
    ("lora_dropout", lambda config: config.model_type == "lora", "model_type is not lora"),
    ("flow_beta_schedule_alpha", lambda config: config.flow_use_beta_schedule, "flow_use_beta_schedule is not set"),
    ("flow_beta_schedule_beta", lambda config: config.flow_use_beta_schedule, "flow_use_beta_schedule is not set"),
    (
        "flow_sigmoid_scale",
        lambda config: not (config.flow_use_beta_schedule or config.flow_use_uniform_schedule),
        "another law of noise levels is chosen",
    ),
    (
        "gradient_checkpointing_interval",
        lambda config: config.gradient_checkpointing,
        "gradient_checkpointing is off",
    ),
    ("grad_clip_method", lambda config: config.max_grad_norm > 0, "max_grad_norm is 0"),
    ("lr_power", lambda config: config.lr_scheduler == "polynomial", "lr_scheduler is not polynomial"),
    (
        "lr_num_cycles",
        lambda config: config.lr_scheduler in ("cosine_with_restarts", "sine"),
        "lr_scheduler is neither cosine_with_restarts nor sine",
    ),
    ("lr_end", lambda config: not config.lr_scheduler.startswith("constant"), "lr_scheduler is constant"),
)
