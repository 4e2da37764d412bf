"""Where the bytes of a group stay while they are not on the device: main memory, or memory-mapped files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hooktuner.errors import ModelError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooktuner_group_offload.layout import Group

KEY = "weights"
"""The one tensor of a file: the group's bytes. Names, dtypes and shapes are in the metadata."""


class MainMemory:
    """Flat copies in main memory, page-locked for CUDA, so that copies run beside the computation.

    The memory is registered with the driver where it lies: torch's own pinned allocator rounds every allocation up
    to a power of two, which for blocks of 612 MB would cost 1 GiB each.
    """

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._pinned: list[Tensor] = []
        self.unpinned_bytes = 0
        """What the system refused to page-lock."""

    def keep(self, group: Group) -> Tensor:
        """The resting place of a group's present values."""
        flat = group.gathered()
        if self._pin:
            if int(_driver().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)) == 0:
                self._pinned.append(flat)
            else:
                self.unpinned_bytes += flat.numel()
        return flat

    def close(self) -> None:
        """Unlock the pages; the tensors stay as they are."""
        while self._pinned:
            _driver().cudaHostUnregister(self._pinned.pop().data_ptr())


def _driver() -> Any:
    return torch.cuda.cudart()


class Disk:
    """One safetensors file per group, memory-mapped, in a folder of this run's own.

    `close` removes the folder. Mapped tensors stay readable after that on systems that keep open files (Linux, macOS).
    """

    unpinned_bytes = 0

    def __init__(self, path: str) -> None:
        """Errors: `ModelError` where the folder cannot be made."""
        try:
            parent = Path(path).expanduser()
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="hooktuner-", dir=parent))
        except OSError as failure:
            raise ModelError(
                f"group_offload_to_disk_path — {path} cannot be used: {failure.strerror}. Name a folder that can be "
                "written, or remove the key."
            ) from failure
        self._count = 0

    def keep(self, group: Group) -> Tensor:
        """The resting place of a group's present values: a mapped file, of which reading takes memory that the
        system can take back. Errors: `ModelError` where the disk is full."""
        path = self.folder / f"group-{self._count:04d}.safetensors"
        self._count += 1
        layout = {
            entry.name: f"{entry.dtype} {list(entry.size)} stride {list(entry.stride)} at byte {entry.offset}"
            for entry in group.entries
        }
        try:
            save_file({KEY: group.gathered()}, path, metadata=layout)
        except Exception as failure:
            raise ModelError(
                f"group_offload_to_disk_path — {path} cannot be written: {failure}. Make room there, name another "
                "folder, or remove the key."
            ) from failure
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.get_tensor(KEY)

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
