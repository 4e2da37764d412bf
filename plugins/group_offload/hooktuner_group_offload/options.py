"""The config keys. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hooktuner.config import Flag, PluginOptions
from hooktuner.errors import Problem
from pydantic import Field

if TYPE_CHECKING:
    from hooktuner.context import Run


class GroupOffloadOptions(PluginOptions):
    """Options of `group-offload`."""

    enable_group_offload: Flag | None = Field(
        None,
        description="Keep the frozen weights of the transformer blocks in main memory (or on disk) and bring them to "
        "the device group by group.",
    )
    group_offload_type: Literal["block_level", "leaf_level"] = Field(
        "block_level",
        description="What a group is: `block_level` = `group_offload_blocks_per_group` whole blocks, `leaf_level` = "
        "one layer (least memory, many small copies).",
    )
    group_offload_blocks_per_group: int = Field(
        1, ge=1, description="Consecutive blocks that are copied together; `block_level` only."
    )
    group_offload_use_stream: Flag = Field(
        True,
        description="Copy groups ahead of time on a CUDA stream of their own, behind the computation; `false` copies "
        "each group when it is needed. Without CUDA there are no streams and copies are made one after the other.",
    )
    group_offload_to_disk_path: str | None = Field(
        None,
        description="Folder on a fast disk where the offloaded weights rest instead of in main memory (memory-mapped "
        "safetensors in a folder of their own, removed at the end of the run).",
    )
    group_offload_resident_blocks: int | None = Field(
        None,
        ge=0,
        description="How many blocks stay on the device, spread evenly; the rest is streamed. Default: with CUDA as "
        "many as the memory measured in the first two steps leaves room for, otherwise 0.",
    )
    group_offload_ring_depth: int = Field(
        2, ge=1, le=16, description="Buffers on the device, each as large as the largest group; 1 leaves no room ahead."
    )
    enable_model_cpu_offload: Flag | None = Field(
        None,
        description="Offloading of whole models between sampling stages, which is not for training: `true` is refused; "
        "use `enable_group_offload`.",
    )

    def active(self) -> bool | None:
        """`enable_group_offload`; `enable_model_cpu_offload` also wakes the plugin, which refuses it."""
        return True if self.enable_model_cpu_offload else self.enable_group_offload

    def problems(self, run: Run) -> Iterable[Problem]:
        """What cannot work: full training, model offload, groups of blocks made of leaves, a file as the folder."""
        if self.enable_model_cpu_offload:
            together = bool(self.enable_group_offload)
            yield Problem(
                "enable_model_cpu_offload",
                "it cannot be combined with enable_group_offload, because both would decide where the same weights live"
                if together
                else "it moves whole models between the stages of sampling, and training needs the denoiser in every "
                "step",
                "Remove enable_model_cpu_offload." if together else 'Use "enable_group_offload": true instead.',
            )
        if run.config.model_type != "lora":
            yield Problem(
                "enable_group_offload",
                f"group offload streams frozen weights, and model_type {run.config.model_type} trains all of them, so "
                "that nothing could be streamed",
                'Use "model_type": "lora", or remove enable_group_offload.',
            )
        if self.group_offload_type == "leaf_level" and self.group_offload_blocks_per_group > 1:
            yield Problem(
                "group_offload_blocks_per_group",
                "with group_offload_type leaf_level a group is one layer, not several blocks",
                'Remove it, or use "group_offload_type": "block_level".',
            )
        if self.group_offload_to_disk_path is not None:
            if not self.group_offload_to_disk_path.strip():
                yield Problem("group_offload_to_disk_path", "is empty", "Name a folder, or remove it.")
            elif Path(self.group_offload_to_disk_path).expanduser().is_file():
                yield Problem(
                    "group_offload_to_disk_path",
                    f"{self.group_offload_to_disk_path} is a file",
                    "Name a folder; it is made if need be.",
                )
