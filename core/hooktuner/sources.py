"""Where a run's checkpoint comes from: a hub id, a folder, or a folder that a flavour builds offline."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hooktuner.context import Run
from hooktuner.errors import ModelError
from hooktuner.files import atomic_folder


def home() -> Path:
    """Where hooktuner keeps what it builds for several runs: `HOOKTUNER_HOME`, or `~/.cache/hooktuner`."""
    return Path(os.environ.get("HOOKTUNER_HOME") or "~/.cache/hooktuner").expanduser()


def build_model_source(run: Run) -> Path | str:
    """The checkpoint of a run: what the user named, else the flavour's repository, else the folder it builds.

    A built folder is kept under `home()/models`, named after family, flavour and the code that builds it, and appears
    there complete or not at all.

    Errors: `ModelError` for a flavour without a checkpoint.
    """
    assert run.card is not None
    if run.config.pretrained_model_name_or_path is not None:
        return run.config.pretrained_model_name_or_path
    flavour = run.flavour
    if flavour.repository is not None:
        return flavour.repository
    if flavour.build is None:
        raise ModelError(
            f'model_flavour — flavour "{flavour.name}" of {run.card.name} has no published checkpoint. '
            "Set pretrained_model_name_or_path to a folder in the diffusers layout."
        )
    folder = home() / "models" / f"{run.card.name}-{flavour.name}-{_code_hash(flavour.build)}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder, keep_existing=True) as unfinished:
            flavour.build(unfinished)
    return folder


def _code_hash(build: Callable[..., Any]) -> str:
    """A hash of the package that defines `build` (a plugin's other modules may help) and of a partial's arguments."""
    digest = hashlib.blake2b(digest_size=5)
    while isinstance(build, functools.partial):
        digest.update(f"{build.args}{sorted(build.keywords.items())}".encode())
        build = build.func
    build = inspect.unwrap(build)
    package = sys.modules.get(build.__module__.partition(".")[0])
    folders = [Path(folder) for folder in getattr(package, "__path__", ())]
    source = inspect.getsourcefile(build)
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))] or [Path(source)] if source else []
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
