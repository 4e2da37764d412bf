"""The entries of `data_backend_config`, a JSON list: what is trained on, and where caches go.

    [
      {"id": "my-clips", "type": "local", "dataset_type": "video", "instance_data_dir": "clips",
       "caption_strategy": "textfile", "resolution": 480, "video": {"num_frames": 61, "frame_rate": 24}},
      {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": true, "cache_dir": "cache/text"}
    ]

Strict: a key that nothing reads is refused, and so is one that has no effect beside the others. `entries.py`
has the models. Importing this module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from hooktuner.config import RunConfig
from hooktuner.data.entries import (
    KINDS,
    Dataset,
    ImageDataset,
    MediaDataset,
    TextEmbedsDataset,
    VideoDataset,
    VideoSettings,
)
from hooktuner.errors import Problem, did_you_mean
from hooktuner.keys import problems_of, takes_bool

if TYPE_CHECKING:
    from hooktuner.family import Flavour, LatentSpec

UNKNOWN = "unknown option"
"""How `keys.problems_of` says that nothing reads a key."""

DEFAULT_SECONDS = 5
"""How long a training clip is where the dataset does not say."""


# ------------------------------------------------------------------------------------------------------- reading


def read_datasets(source: Path | str | list[Any], config: RunConfig) -> tuple[tuple[Dataset, ...], list[Problem]]:
    """Read a datasets file (or take an already parsed list) and say everything that is wrong with it.

    Returns the entries that could be read, disabled ones included, and the problems: where these are not empty the
    run must not start. Paths look like `datasets.json: [0].video.num_frames`.
    """
    if isinstance(source, list):
        name, entries, problems = "data_backend_config", source, []
    else:
        name = Path(source).name
        entries, problems = _parse(Path(source), name)
    datasets: list[Dataset] = []
    for number, entry in enumerate(entries):
        location = f"{name}: [{number}]"
        dataset, wrong = _read_entry(entry, location)
        problems += wrong
        if dataset is not None:
            datasets.append(dataset)
            problems += _entry_problems(dataset, config)
    if not problems or datasets:
        problems += _file_problems(datasets, name, config, complete=len(datasets) == len(entries))
    return tuple(datasets), problems


def _parse(path: Path, name: str) -> tuple[list[Any], list[Problem]]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as failure:
        reason = failure.strerror or str(failure)
        return [], [Problem(str(path), f"the datasets file cannot be read: {reason}", "Check `data_backend_config`.")]
    except UnicodeDecodeError:
        return [], [Problem(name, "the datasets file is not UTF-8 text", "Save it as UTF-8.")]
    except json.JSONDecodeError as failure:
        where = f"{name}: line {failure.lineno}, column {failure.colno}"
        return [], [Problem(where, f"this is not JSON: {failure.msg}", "Correct it there or just before.")]
    if not isinstance(parsed, list):
        fix = "Write [ … ] around the entries."
        return [], [Problem(name, f"a datasets file is a JSON list of entries, not {_json_kind(parsed)}", fix)]
    return parsed, []


def _read_entry(entry: Any, location: str) -> tuple[Dataset | None, list[Problem]]:
    if not isinstance(entry, dict):
        return None, [Problem(location, f"an entry is a JSON object, not {_json_kind(entry)}")]
    kind = entry.get("dataset_type")
    if kind not in KINDS:
        known = ", ".join(f'"{name}"' for name in KINDS)
        why = "missing" if kind is None else f"unknown dataset type {json.dumps(kind)}"
        fix = f"{did_you_mean(str(kind), KINDS)} Known: {known}.".strip()
        return None, [Problem(f"{location}.dataset_type", why, fix)]
    model = KINDS[kind]
    problems = [*_numbers_not_flags(entry, model, location)]
    if isinstance(entry.get("video"), dict) and model is VideoDataset:
        problems += _numbers_not_flags(entry["video"], VideoSettings, f"{location}.video")
    try:
        dataset = model.model_validate(entry)
    except ValidationError as failure:
        found = problems_of(failure, entry, lambda key: f"{location}.{key}" if key else location, model)
        problems += [_with_place(problem, location, model) for problem in found]
        rest = _without_wrong_keys(entry, failure, model)
        if rest is None:
            return None, problems
        dataset = rest
    dataset._location = location
    return dataset, problems


def _without_wrong_keys(entry: dict[str, Any], failure: ValidationError, model: type[Dataset]) -> Dataset | None:
    """The entry without the keys that are unknown or wrong, so that its other mistakes are found in the same report;
    None where nothing usable is left."""
    rest = json.loads(json.dumps(entry))
    try:
        for error in failure.errors():
            *path, key = error["loc"]
            holder = rest
            for part in path:
                holder = holder[part]
            holder.pop(key, None)
        return model.model_validate(rest)
    except (ValidationError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _numbers_not_flags(entry: dict[str, Any], model: type[BaseModel], location: str) -> Iterator[Problem]:
    """`true` would count as the number 1."""
    for key, value in entry.items():
        if isinstance(value, bool) and key in model.model_fields and not takes_bool(model.model_fields[key]):
            yield Problem(f"{location}.{key}", f"{json.dumps(value)} is not possible here")


def _with_place(problem: Problem, location: str, model: type[BaseModel]) -> Problem:
    """An unknown key that has no near name, with the place where it would be known, or with what is known here."""
    if problem.why != UNKNOWN or problem.fix:
        return problem
    parent, _, key = problem.where.removeprefix(f"{location}.").rpartition(".")
    if parent == "video":
        fix = 'It belongs one level up, beside "video".' if key in model.model_fields else ""
        return replace(problem, fix=fix or f"Known: {', '.join(VideoSettings.model_fields)}.")
    if "video" in model.model_fields and key in VideoSettings.model_fields:
        return replace(problem, fix=f'It belongs into "video": {{"{key}": …}}.')
    return replace(problem, fix=f"Known: {', '.join(model.model_fields)}.")


def _json_kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ------------------------------------------------------------------------------------------------------ checking


def _entry_problems(dataset: Dataset, config: RunConfig) -> Iterator[Problem]:
    if dataset.disabled or isinstance(dataset, TextEmbedsDataset):
        return
    at = dataset.location
    folder = Path(dataset.instance_data_dir)
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "there is no such folder"
        fix = f"Paths are relative to the working directory ({Path.cwd()})."
        yield Problem(f"{at}.instance_data_dir", f"{dataset.instance_data_dir}: {why}", fix)
    strategy = dataset.captions_from(config)
    if (strategy == "instanceprompt" or dataset.prepend_instance_prompt) and not dataset.instance_prompt:
        reader = "prepend_instance_prompt" if dataset.prepend_instance_prompt else 'caption_strategy "instanceprompt"'
        yield Problem(f"{at}.instance_prompt", f"missing, and {reader} needs it", "Write the prompt here.")
    if strategy == "instanceprompt" and dataset.prepend_instance_prompt:
        yield Problem(f"{at}.prepend_instance_prompt", "the caption is the instance prompt already", "Remove it.")
    if dataset.instance_prompt and strategy != "instanceprompt" and not dataset.prepend_instance_prompt:
        fix = 'Set caption_strategy to "instanceprompt", or prepend_instance_prompt to true, or remove it.'
        yield Problem(f"{at}.instance_prompt", f'it has no effect with caption_strategy "{strategy}"', fix)
    if dataset.disable_multiline_split and strategy != "textfile":
        why = f'it has no effect with caption_strategy "{strategy}"'
        yield Problem(f"{at}.disable_multiline_split", why, "Remove it.")
    if dataset.crop_aspect is not None and not dataset.crop:
        yield Problem(f"{at}.crop_aspect", "it has no effect without crop", 'Set "crop": true, or remove it.')
    if isinstance(dataset, VideoDataset):
        yield from _length_problems(dataset)


def _length_problems(dataset: VideoDataset) -> Iterator[Problem]:
    at, video = f"{dataset.location}.video", dataset.video
    if video.max_frames is not None:
        for name in ("min_frames", "num_frames"):
            value = getattr(video, name)
            if value is not None and value > video.max_frames:
                why = f"{value} is more than max_frames ({video.max_frames}), so no clip is left"
                yield Problem(f"{at}.{name}", why, f"Lower {name} or raise max_frames.")
    if video.frame_interval is not None:
        if video.bucket_strategy != "resolution_frames":
            why = f'it has no effect with bucket_strategy "{video.bucket_strategy}"'
            fix = 'Set "bucket_strategy": "resolution_frames", or remove it.'
            yield Problem(f"{at}.frame_interval", why, fix)
        elif video.num_frames is not None:
            fix = "Remove one of the two."
            yield Problem(f"{at}.frame_interval", "it has no effect where num_frames fixes the length", fix)


def _file_problems(datasets: Sequence[Dataset], name: str, config: RunConfig, *, complete: bool) -> Iterator[Problem]:
    """What is wrong among entries. `complete`: every entry could be read, so what is missing is really missing."""
    seen: dict[str, Dataset] = {}
    for dataset in datasets:
        if dataset.id in seen:
            why = f'"{dataset.id}" is also the id of {seen[dataset.id].location.removeprefix(f"{name}: ")}'
            yield Problem(f"{dataset.location}.id", why, "Give one of them another id.")
        seen.setdefault(dataset.id, dataset)
    texts = [dataset for dataset in datasets if isinstance(dataset, TextEmbedsDataset) and not dataset.disabled]
    chosen = [dataset for dataset in texts if dataset.default]
    if len(chosen) > 1 or (len(texts) > 1 and not chosen):
        which = chosen or texts
        fix = 'Leave "default": true to one of them.' if chosen else 'Set "default": true on one of them.'
        ids = ", ".join(f'"{dataset.id}"' for dataset in which)
        yield Problem(f"{which[1].location}.default", f"a run uses one text_embeds entry, and {ids} compete", fix)
    if not complete:
        return
    media = [dataset for dataset in datasets if isinstance(dataset, MediaDataset) and not dataset.disabled]
    if not any(not dataset.is_validation_only(config) for dataset in media):
        why = 'there is nothing to train on: no enabled entry of dataset_type "video" or "image"'
        yield Problem(name, why, "Add one, or enable one that is disabled.")
    wanted = config.eval_dataset_id
    if wanted is not None:
        image_ids = [dataset.id for dataset in media if isinstance(dataset, ImageDataset)]
        if wanted not in image_ids:
            fix = did_you_mean(wanted, image_ids) or "Add one with this id."
            yield Problem("eval_dataset_id", f'{name} has no enabled image dataset with the id "{wanted}"', fix)
        elif not config.validation_using_datasets:
            fix = "Set validation_using_datasets to true, or remove it."
            yield Problem("eval_dataset_id", "it has no effect without validation_using_datasets", fix)


def default_frames(rate: float, latents: LatentSpec, max_frames: int | None = None) -> int:
    """Frames of a clip where nobody says: five seconds (121 at 24 fps), at most `max_frames`, legal for the model."""
    frames = round(DEFAULT_SECONDS * rate) + 1
    return latents.frames.floor(min(frames, max_frames) if max_frames else frames)


def frame_problems(datasets: Sequence[Dataset], latents: LatentSpec, config: RunConfig) -> list[Problem]:
    """Lengths that the model cannot train, with the nearest that it can. Asked before anything is loaded."""
    problems: list[Problem] = []
    for dataset in datasets:
        if dataset.disabled or not isinstance(dataset, VideoDataset):
            continue
        at, video = f"{dataset.location}.video", dataset.video
        if video.num_frames is not None and (why := latents.frames.problem(video.num_frames)):
            problems.append(Problem(f"{at}.num_frames", why))
        maximum = latents.frames.maximum
        if video.num_frames is None and video.bucket_strategy == "aspect_ratio" and dataset.frame_rate(config) is None:
            why = "missing, and neither the dataset nor the run has a frame rate from which five seconds would follow"
            problems.append(Problem(f"{at}.num_frames", why, "Write it here."))
        if maximum is not None and video.num_frames is None and (video.min_frames or 0) > maximum:
            # longer files would be cut to the model's maximum, which is not what a minimum asks for
            why = f"{video.min_frames} is more than the model can train at once ({maximum})"
            problems.append(Problem(f"{at}.min_frames", why, "Lower it, or set num_frames."))
    return problems


def conditioning_problems(datasets: Sequence[Dataset], flavour: Flavour) -> list[Problem]:
    """Datasets that want a given first frame from a flavour that takes none."""
    if "first_frame" in flavour.conditioning:
        return []
    why = f'flavour "{flavour.name}" is not conditioned on a first frame'
    fix = "Choose an image-to-video flavour, or remove it."
    return [
        Problem(f"{dataset.location}.video.is_i2v", why, fix)
        for dataset in datasets
        if isinstance(dataset, VideoDataset) and not dataset.disabled and dataset.video.is_i2v
    ]
