"""Files that are complete or absent: written under a temporary name in the same folder, flushed, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"


def partial_name(path: Path) -> Path:
    """A temporary neighbour of `path`, unique to this process."""
    return path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = partial_name(path)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the body has finished and everything is on disk.

    An existing folder of that name is replaced; with `keep_existing` it stays, for folders that several processes may
    make at once and that others may already be reading.
    """
    temporary = partial_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        if not keep_existing:
            remove_folder(path)
        try:
            os.rename(temporary, path)
        except OSError:
            if not (keep_existing and path.is_dir()):
                raise
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill in the middle leaves nothing under its name."""
    if path.exists():
        doomed = partial_name(path.with_name(f"old-{path.name}"))
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def remove_partials(folder: Path) -> None:
    """Remove what killed writes left in a folder that only this run writes to."""
    for leftover in folder.glob(f"{PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
