"""The offload strategy: puts weights in their places, changes the plan when memory asks for it, cleans up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from hooktuner.context import Run
from hooktuner.errors import PluginError
from hooktuner.step import Step
from hooktuner.technique import OffloadStrategy
from torch import nn

from hooktuner_group_offload import NAME
from hooktuner_group_offload.blocks import BlockResidency
from hooktuner_group_offload.device import CudaDevice, Device, SimulatedDevice
from hooktuner_group_offload.leaves import LeafResidency
from hooktuner_group_offload.meter import Meter, TransferWatch
from hooktuner_group_offload.options import GroupOffloadOptions
from hooktuner_group_offload.plan import Plan, make_plan, spread
from hooktuner_group_offload.rest import Disk, MainMemory
from hooktuner_group_offload.ring import Ring

MEASURED_STEPS = 2
"""Steps with everything streamed before memory is measured; the optimizer has its state from the first."""
RESERVE = 0.1
"""Share of the device's memory that the choice of resident blocks leaves for larger buckets and fragmentation."""
GIB = 2**30


class Offload(OffloadStrategy):
    """Streams the frozen weights of `model`'s blocks. `device`: where to, for tests; default: that of the run."""

    def __init__(
        self, run: Run, model: nn.Module, options: GroupOffloadOptions, *, device: Device | None = None
    ) -> None:
        assert run.device is not None
        assert run.anatomy is not None
        self.model = model
        self.meter = Meter()
        self._run = run
        self._options = options
        self._cuda = run.device.type == "cuda"
        if device is None and not self._cuda:
            device = SimulatedDevice(self.meter)
        self._device: Device = device or CudaDevice(run.device, self.meter, ahead=options.group_offload_use_stream)
        leaves = options.group_offload_type == "leaf_level"
        self._plan = make_plan(
            model,
            run.anatomy.extra_blocks(model),
            run.anatomy.blocks(model),
            leaves=leaves,
            blocks_per_group=options.group_offload_blocks_per_group,
            device=run.device.type,
        )
        self._ring = Ring(self._device, options.group_offload_ring_depth, ahead=options.group_offload_use_stream)
        self._blocks = {id(block): block for unit in self._plan.units for block in unit.blocks}
        if leaves:
            self.interceptor: BlockResidency | LeafResidency = LeafResidency(self._begin)
        else:
            group_of = {id(block): unit.groups[0] for unit in self._plan.units for block in unit.blocks}
            self.interceptor = BlockResidency(self._ring, group_of, self._begin)
        self._rest: MainMemory | Disk | None = None
        self._resident: frozenset[int] = frozenset()
        self._next: int | None = None
        """How many units shall be resident from the next micro-step on."""
        self._measuring = self._cuda and options.group_offload_resident_blocks is None
        self._replanned = False
        self._reports = 0
        self._clock: float | None = None
        self._watch = TransferWatch(_advice(options))

    @property
    def plan(self) -> Plan:
        """Which weights are streamed."""
        return self._plan

    @property
    def resident_units(self) -> int:
        """How many units stay on the device."""
        return len(self._resident)

    def _stay(self) -> str:
        blocks = sum(len(self._plan.units[number].blocks) for number in self._resident)
        return f"{blocks} of {len(self._blocks)} blocks stay on the device"

    def device_bytes(self) -> int:
        """Bytes on the device for weights of this plan: the ring's buffers and the resident groups."""
        return self._ring.nbytes + sum(group.nbytes for group in self._plan.groups if group.resident is not None)

    # -------------------------------------------------------------------------------------------------- placing

    def place(self) -> None:
        """Frozen block weights go to rest, everything else to the device. Errors: `ModelError` for a disk that cannot
        be used; `PluginError` where nothing can be streamed."""
        if not self._plan.units:
            raise PluginError(
                f"{NAME} — the blocks of {type(self.model).__name__} have no frozen weights that could be streamed. "
                "Remove enable_group_offload."
            )
        try:
            self._place()
        except BaseException:
            self.close()
            raise

    def _place(self) -> None:
        options = self._options
        streamed = {id(entry.parameter): entry.name for group in self._plan.groups for entry in group.entries}
        _move_others(self.model, streamed.keys(), self._run.device)
        path = options.group_offload_to_disk_path
        self._rest = Disk(path) if path is not None else MainMemory(pin=self._cuda)
        for group in self._plan.groups:
            group.rest = self._rest.keep(group)
            self._device.absent(group)
        per_unit = options.group_offload_blocks_per_group
        self._keep_resident((options.group_offload_resident_blocks or 0) // per_unit)
        if isinstance(self.interceptor, LeafResidency):
            pairs = [pair for unit in self._plan.units for pair in zip(unit.groups, unit.leaves, strict=True)]
            self.interceptor.attach(self._ring, pairs)
        else:
            self.interceptor.attach(self._blocks)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Frozen weights are equal everywhere; DDP would broadcast them from where they are not.
            self.model._ddp_params_and_buffers_to_ignore = list(streamed.values())  # type: ignore[assignment]
        self._describe()

    def _keep_resident(self, count: int) -> None:
        """Let so many units stay on the device, spread evenly; stream the others."""
        units = self._plan.units
        self._ring.clear()
        self._resident = spread(count, len(units))
        for number, unit in enumerate(units):
            for group in unit.groups:
                if number not in self._resident:
                    group.resident = None
                    self._device.absent(group)
        for number in self._resident:
            for group in units[number].groups:
                if group.resident is None:
                    group.resident = self._device.copy(group)
                group.bind(group.resident)
        self._ring.rebuild([group for group in self._plan.groups if group.resident is None])

    def _describe(self) -> None:
        options, plan = self._options, self._plan
        total = sum(group.nbytes for group in plan.groups)
        where = f"on disk ({options.group_offload_to_disk_path})" if isinstance(self._rest, Disk) else "in main memory"
        say = self._run.note
        say(
            f"{NAME}: {total / GIB:.2f} GiB of frozen weights in {len(plan.groups)} groups rest {where}; "
            f"{self._stay()}, and {self._ring.nbytes / GIB:.2f} GiB of buffers serve the rest."
        )
        if plan.fixed:
            say(f"{NAME}: {plan.fixed / GIB:.2f} GiB of frozen block weights are shared or of a special tensor type "
                "and stay on the device.")  # fmt: skip
        if not self._cuda:
            say(f"{NAME}: there is no CUDA device, so this is a simulation in main memory: results are the same, "
                "nothing is saved, and copies make it slower (group_offload_use_stream needs CUDA).")  # fmt: skip
        if self._rest is not None and self._rest.unpinned_bytes:
            say(f"{NAME}: the system refused to page-lock {self._rest.unpinned_bytes / GIB:.2f} GiB, so copies from "
                "there are slower. Raise the limit of locked memory (ulimit -l).")  # fmt: skip
        if not self._run.config.gradient_checkpointing:
            say(f"{NAME}: gradient_checkpointing is off; results are the same, and activations take far more memory "
                "than offloading saves.")  # fmt: skip

    # -------------------------------------------------------------------------------------------------- changing

    def _begin(self, step: Step) -> None:
        """A micro-step begins: the only time when no graph knows the plan."""
        self.meter.open(step.number)
        for group in self._plan.groups:
            for entry in group.entries:
                if entry.parameter.requires_grad:
                    raise PluginError(
                        f"{NAME} — {entry.name} became trainable after its weights were offloaded, so its updates "
                        "would be lost. Another plugin unfreezes it; train without one of the two."
                    )
        if self._next is not None:
            self._keep_resident(self._next)
            self._next = None
            if self._cuda:
                torch.cuda.empty_cache()

    def out_of_memory(self) -> bool:
        """Stream everything, once. (There is no second try, so it takes all that there is.)"""
        self._measuring = False
        self.interceptor.sweep()
        if self._replanned or not self._resident:
            return False
        self._replanned = True
        self._run.note(
            f"{NAME}: the device ran out of memory while {self._stay()}; all are streamed from here on, and the step "
            'is repeated. Set "group_offload_resident_blocks" lower to avoid that.'
        )
        self._next = None
        self._keep_resident(0)
        return True

    def _choose_resident(self) -> None:
        """From the peak of the first steps: how many units fit beside it."""
        device = self._run.device
        assert device is not None
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        room = total * (1 - RESERVE) - others - torch.cuda.max_memory_allocated(device)
        self._next = fitting(room, [unit.nbytes for unit in self._plan.units])
        if self._next:
            kept = self._next * self._options.group_offload_blocks_per_group
            self._run.note(
                f"{NAME}: {room / GIB:.1f} GiB of device memory are unused, so {min(kept, len(self._blocks))} of "
                f"{len(self._blocks)} blocks stay on the device from here on."
            )

    # -------------------------------------------------------------------------------------------------- numbers

    def report(self) -> Mapping[str, float]:
        """`bytes_h2d`, `stall_seconds` and `hidden_fraction` of the step that has finished. Without CUDA nothing runs
        beside the computation, and the last two are 0."""
        now = time.perf_counter()
        seconds, self._clock = now - (self._clock or now), now
        numbers = self.meter.report()
        self._reports += 1
        if self._measuring and self._reports == 1 and self._cuda:
            torch.cuda.reset_peak_memory_stats(self._run.device)  # until here it is that of encoding and loading
        if self._measuring and self._reports > MEASURED_STEPS:
            self._measuring = False
            self._choose_resident()
        warning = self._watch.look(numbers, seconds) if seconds else None
        if warning:
            self._run.note(warning)
        return numbers

    def close(self) -> None:
        """Weights are plain tensors in main memory again; buffers, hooks and files are gone."""
        self.interceptor.sweep()
        self.interceptor.detach()
        if self._cuda:
            torch.cuda.synchronize(self._run.device)
        self._ring.clear()
        for group in self._plan.groups:
            if group.rest.numel():
                group.bind(group.rest)
            group.resident = None
        if self._rest is not None:
            self._rest.close()
            self._rest = None
        if hasattr(self.model, "_ddp_params_and_buffers_to_ignore"):
            del self.model._ddp_params_and_buffers_to_ignore


def _move_others(model: nn.Module, streamed: Sequence[int] | object, device: torch.device | None) -> None:
    """Everything that is not streamed goes to the device; parameters stay the same objects."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in streamed:  # type: ignore[operator]
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def fitting(room: float, sizes: Sequence[int]) -> int:
    """How many units, spread evenly, fit into `room` bytes."""
    count = 0
    while count < len(sizes) and sum(sizes[number] for number in spread(count + 1, len(sizes))) <= room:
        count += 1
    return count


def _advice(options: GroupOffloadOptions) -> str:
    """The setting that helps a run that waits for copies, the most effective first."""
    if not options.group_offload_use_stream:
        return 'Set "group_offload_use_stream": true.'
    if options.group_offload_to_disk_path is not None:
        return "Remove group_offload_to_disk_path if main memory suffices: disks are slower than the bus."
    if options.group_offload_ring_depth == 1:
        return 'Set "group_offload_ring_depth": 2, so that a copy can be made ahead.'
    if options.group_offload_resident_blocks is not None:
        return "Raise group_offload_resident_blocks, or remove it to have it chosen from free memory."
    if options.group_offload_type == "leaf_level":
        return 'Set "group_offload_type": "block_level": fewer and larger copies.'
    return "Raise train_batch_size or the resolution: the same copies then hide behind more work."
