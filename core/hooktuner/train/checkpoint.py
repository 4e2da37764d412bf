"""Checkpoints: complete or absent, resumed bit for bit.

    checkpoints/step-000100/
        pytorch_lora_weights.safetensors   the adapter for other programs, or `transformer/` for full training
        config.resolved.json               what ran
        plugins.lock.json                  which plugins, in which versions
        state/run.json                     step, position in the data, optimizer settings, states of regularizers
        state/trainables.safetensors       trained parameters as they are (an export may fold or round them)
        state/optimizer.safetensors        `<parameter>/<slot>`

No pickle: tensors are safetensors, the rest is JSON. Random generators need no saving (`randomness.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hooktuner.context import Run
from hooktuner.errors import CheckpointError
from hooktuner.files import atomic_folder, remove_folder, remove_partials, write_json
from hooktuner.train.adapters import export
from hooktuner.train.kernel import Kernel

FOLDER = "checkpoints"
CONFIG_FILE = "config.resolved.json"
LOCK_FILE = "plugins.lock.json"
STATE_FILE = "state/run.json"
TRAINABLES_FILE = "state/trainables.safetensors"
OPTIMIZER_FILE = "state/optimizer.safetensors"
FORMAT = 1

FIXED_KEYS = ("model_family", "model_flavour", "model_type", "lora_rank", "lora_alpha", "optimizer")
"""Config keys whose change makes a checkpoint meaningless for the run."""
MOVABLE_KEYS = (
    "output_dir", "cache_dir", "max_train_steps", "num_train_epochs", "resume_from_checkpoint", "plugins",
    "report_to", "tracker_project_name", "tracker_run_name", "checkpoints_total_limit", "checkpoint_step_interval",
)  # fmt: skip
"""Config keys that may change on resume without a word."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` optimizer steps are done, `micro` is the next micro-batch over all processes.
    `data` is the fingerprint of what it trains on (`Loader.fingerprint`)."""

    step: int = 0
    micro: int = 0
    data: str = ""


# -------------------------------------------------------------------------------------------------------- saving


def save(run: Run, kernel: Kernel, position: Position, config: Mapping[str, Any], lock: Mapping[str, Any]) -> Path:
    """Write `checkpoints/step-NNNNNN/`, then remove the oldest beyond `checkpoints_total_limit`. Returns the path."""
    path = folder_of(run.output_dir, position.step)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    with atomic_folder(path) as folder:
        (folder / "state").mkdir()
        export(run, kernel.denoiser, folder)
        write_json(folder / CONFIG_FILE, config)
        write_json(folder / LOCK_FILE, lock)
        tensors = {name: value.detach().cpu().contiguous() for name, value in _state_parameters(run, kernel).items()}
        save_file(tensors, folder / TRAINABLES_FILE)
        slots, settings = _optimizer_state(kernel)
        save_file(slots, folder / OPTIMIZER_FILE)
        state = {
            "format": FORMAT,
            "step": position.step,
            "micro": position.micro,
            "data": position.data,
            "optimizer": settings,
            "regularizers": {plugin: dict(one.state()) for plugin, one in kernel.regularizers.items()},
        }
        write_json(folder / STATE_FILE, state)
    _forget_old(run, keep=path)
    return path


def _state_parameters(run: Run, kernel: Kernel) -> dict[str, torch.Tensor]:
    """Parameters that no exported file holds exactly: everything but the fully trained denoiser's."""
    groups = kernel.trainables.groups
    return {
        name: value
        for group, parameters in groups.items()
        if not (group == "denoiser" and run.config.model_type == "full")
        for name, value in parameters.items()
    }


def _optimizer_state(kernel: Kernel) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    names = {id(value): name for name, value in kernel.trainables.named().items()}
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, slots in kernel.optimizer.state.items():
        for slot, value in slots.items():
            key = f"{names[id(parameter)]}/{slot}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.detach().cpu().contiguous()
            else:
                scalars[key] = value
    return tensors, {"scalars": scalars}


def _forget_old(run: Run, *, keep: Path) -> None:
    limit = run.config.checkpoints_total_limit
    if limit > 0:
        for old in [path for path in list_checkpoints(run.output_dir) if path != keep][: -(limit - 1) or None]:
            remove_folder(old)


# ------------------------------------------------------------------------------------------------------- finding


def folder_of(output_dir: Path, step: int) -> Path:
    """`checkpoints/step-000100` of a run folder."""
    return output_dir / FOLDER / f"step-{step:06d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [
        path
        for path in (output_dir / FOLDER).glob("step-*")
        if re.fullmatch(r"step-\d+", path.name) and (path / STATE_FILE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def set_aside(output_dir: Path, after_step: int) -> Path | None:
    """Move checkpoints of steps after `after_step` out of the way, into `checkpoints/replaced-N/`; returns that folder.

    They belong to another continuation of the run, or to another run altogether: left in place they would be taken for
    the newest of this one. None where there are none.
    """
    later = [path for path in list_checkpoints(output_dir) if int(path.name.removeprefix("step-")) > after_step]
    if not later:
        return None
    number = 1
    while (folder := output_dir / FOLDER / f"replaced-{number}").exists():
        number += 1
    folder.mkdir()
    for path in later:
        os.replace(path, folder / path.name)
    return folder


def find(run: Run) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, or None for a fresh start.

    Errors: `CheckpointError` where a named checkpoint does not exist (`latest` may find none).
    """
    wanted = run.config.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("none", ""):
        return None
    there = list_checkpoints(run.output_dir)
    if wanted == "latest":
        return there[-1] if there else None
    for candidate in (Path(wanted), run.output_dir / FOLDER / wanted):
        if (candidate / STATE_FILE).is_file():
            return candidate
    names = ", ".join(path.name for path in there) or "none"
    raise CheckpointError(
        f"resume_from_checkpoint — {wanted!r} is not a complete checkpoint. Checkpoints of {run.output_dir}: {names}. "
        "Name one of them, give a path, or use `latest`."
    )


# ------------------------------------------------------------------------------------------------------ resuming


def compare(path: Path, config: Mapping[str, Any], lock: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(refusals, notes): how the run that wants to resume differs from the one that saved `path`."""
    old_config, old_lock = _read_json(path / CONFIG_FILE), _read_json(path / LOCK_FILE)
    refusals, notes = [], []
    for key in sorted({*old_config, *config}):
        before, now = old_config.get(key), config.get(key)
        if before == now or key in MOVABLE_KEYS:
            continue
        line = f"{key} was {json.dumps(before)} and is {json.dumps(now)}"
        (refusals if key in FIXED_KEYS else notes).append(line)
    for plugin in sorted({*old_lock, *lock}):
        before, now = old_lock.get(plugin), lock.get(plugin)
        if before is None or now is None:
            notes.append(f"plugin {plugin} {'is new' if before is None else 'is gone'}")
        elif before != now:
            notes.append(f"plugin {plugin} was {before['version']} and is {now['version']}")
    return refusals, notes


def restore(path: Path, run: Run, kernel: Kernel) -> Position:
    """Put a checkpoint's trained parameters, optimizer and regularizer states into the kernel.

    A fully trained denoiser was already loaded from the checkpoint's `transformer/`. Errors: `CheckpointError` where
    files are missing or damaged or the parameters differ.
    """
    state = _read_json(path / STATE_FILE)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} — was written in format {state.get('format')}, and this version reads format {FORMAT}. "
            "Resume it with the version that wrote it."
        )
    parameters = _state_parameters(run, kernel)
    tensors = _read_tensors(path / TRAINABLES_FILE)
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unknown:
        parts = [
            f"{len(names)} {what} (such as {names[0]})"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise CheckpointError(
            f"{path} — its trained parameters are not those of this run: {' and '.join(parts)}. Resume with the same "
            "plugins and adapter settings, or start afresh with another output_dir."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    _restore_optimizer(path, kernel, state["optimizer"])
    for plugin, saved in state["regularizers"].items():
        if plugin in kernel.regularizers:
            kernel.regularizers[plugin].restore(saved)
    return Position(state["step"], state["micro"], state["data"])


def _restore_optimizer(path: Path, kernel: Kernel, settings: Mapping[str, Any]) -> None:
    named = kernel.trainables.named()
    values: dict[str, Any] = {**_read_tensors(path / OPTIMIZER_FILE), **settings["scalars"]}
    order = [parameter for group in kernel.optimizer.param_groups for parameter in group["params"]]
    number = {id(parameter): index for index, parameter in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in values.items():
        name, slot = key.rsplit("/", 1)
        state.setdefault(number[id(named[name])], {})[slot] = value
    packed = kernel.optimizer.state_dict()
    kernel.optimizer.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise CheckpointError(f"{path} — cannot be read: {failure}. Resume from another checkpoint.") from failure


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as failure:
        raise CheckpointError(f"{path} — cannot be read: {failure}. Resume from another checkpoint.") from failure
