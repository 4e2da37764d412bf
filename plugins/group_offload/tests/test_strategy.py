"""What stays where, memory, disk, out of memory, reports, and the end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hooktuner.errors import ModelError, PluginError
from hooktuner.events import StepStarted
from hooktuner_group_offload.meter import Meter, TransferWatch
from hooktuner_group_offload.options import GroupOffloadOptions
from hooktuner_group_offload.plugin import GroupOffload
from hooktuner_group_offload.strategy import _advice
from torch import nn

Make = Callable[..., Any]


def test_device_bytes_are_those_of_the_ring(trial: Make) -> None:
    """Counted from the live tensors, during a step: no more than the buffers hold frozen weights."""
    one = trial(group_offload_ring_depth=2)
    offload = one.offload
    largest = max(group.nbytes for group in offload.plan.groups)
    assert offload.device_bytes() == 2 * largest < sum(group.nbytes for group in offload.plan.groups) / 2
    entries = [entry for group in offload.plan.groups for entry in group.entries]
    present: list[int] = []

    def look(*_: Any) -> None:
        present.append(sum(entry.span for entry in entries if not entry.parameter.data.isnan().any()))

    for block in one.model.blocks:
        block.register_forward_hook(look)
    one.micro()
    assert len(present) >= 4
    assert 0 < max(present) <= largest  # bound at a time: the one block that computes


def test_buffers_are_the_only_copies(trial: Make) -> None:
    """Autograd keeps none alive without checkpointing, where it would keep all."""
    one = trial(checkpointing=False)
    buffers = {slot.buffer.untyped_storage().data_ptr() for slot in one.offload._ring._slots}
    kept: list[torch.Tensor] = []
    pack = one.offload.interceptor.pack

    def spy(tensor: torch.Tensor, serial: int) -> Any:
        packed = pack(tensor, serial)
        if isinstance(packed, torch.Tensor):
            kept.append(packed)
        return packed

    one.offload.interceptor.pack = spy
    one.micro()
    assert kept
    assert not [tensor for tensor in kept if tensor.untyped_storage().data_ptr() in buffers]


def test_graphs_are_freed(trial: Make) -> None:
    """What is kept for a backward pass that never comes is freed with the output, without the garbage collector."""
    one = trial(checkpointing=False)
    kept: list[weakref.ref[Any]] = []
    pack = one.offload.interceptor.pack

    def spy(tensor: torch.Tensor, serial: int) -> Any:
        packed = pack(tensor, serial)
        if isinstance(packed, torch.Tensor) and packed is not tensor:
            kept.append(weakref.ref(packed))
        return packed

    one.offload.interceptor.pack = spy
    gc.disable()
    try:
        with one.runner.during(one.step):
            output = one.predict()
        assert any(tensor() is not None for tensor in kept)
        del output
        assert not [tensor for tensor in kept if tensor() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("resident", [0, 2, 5, 50])
def test_resident_blocks(trial: Make, kind: str, resident: int) -> None:
    one = trial(group_offload_type=kind, group_offload_resident_blocks=resident)
    kept = min(resident, 5)
    assert one.offload.resident_units == kept
    assert any(f"{kept} of 5 blocks stay on the device" in note for note in one.run.notes)
    streamed = [group for group in one.offload.plan.groups if group.resident is None]
    assert {group.unit for group in one.offload.plan.groups} - {group.unit for group in streamed} == (
        one.offload._resident
    )
    if kept == 5:
        assert one.offload._ring.nbytes == 0
        one.offload.meter.report()
        one.micro()
        assert one.offload.report()["bytes_h2d"] == 0


def test_bytes_per_step(trial: Make) -> None:
    """Forward and backward, less what is there already: two of five buffers at either turn."""
    one = trial(group_offload_ring_depth=2)
    sizes = [group.nbytes for group in one.offload.plan.groups]
    for number in (1, 2, 3):
        one.step.number = number
        one.micro()
        report = one.offload.report()
    assert report == {"bytes_h2d": 2 * sum(sizes) - sum(sizes[:2]) - sum(sizes[-2:]), "stall_seconds": 0.0,
                      "hidden_fraction": 0.0}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("settings", [{}, {"group_offload_type": "leaf_level"}, {"group_offload_resident_blocks": 2}])
@pytest.mark.parametrize("disk", [False, True])
def test_close_restores_plain_tensors(trial: Make, tmp_path: Path, settings: dict[str, Any], disk: bool) -> None:
    if disk:
        settings = {**settings, "group_offload_to_disk_path": str(tmp_path / "rest")}
    resident, one = trial(offload=False), trial(**settings)
    one.micro()
    slots = [weakref.ref(slot.buffer) for slot in one.offload._ring._slots]
    one.offload.close()
    one.runner.detach()
    gc.collect()
    assert [slot() for slot in slots] == [None] * len(slots)
    assert one.offload.device_bytes() == 0
    for (name, wanted), (_, found) in zip(resident.model.named_parameters(), one.model.named_parameters(), strict=True):
        assert type(found.data) is torch.Tensor
        assert torch.equal(wanted, found), name
    for module in one.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)
    resident.runner.detach()
    assert torch.equal(resident.predict(), one.predict())
    if disk:
        assert list((tmp_path / "rest").iterdir()) == []
    one.offload.close()  # a second time harms nothing


def test_a_closed_strategy_is_not_needed_for_placing_again(trial: Make) -> None:
    one = trial()
    one.offload.close()
    one.offload._rest = None
    one.offload.place()
    one.micro()
    assert all(gradient.isfinite().all() for gradient in one.gradients().values())


# ---------------------------------------------------------------------------------------------------- disk


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_disk(trial: Make, tmp_path: Path, kind: str) -> None:
    resident = trial(offload=False)
    one = trial(group_offload_type=kind, group_offload_to_disk_path=str(tmp_path / "a/b"))
    resident.micro()
    one.micro()
    resident.assert_same(one)
    (folder,) = (tmp_path / "a/b").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == len(one.offload.plan.groups)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(folder) in mapped.read_text()
    one.offload.close()
    assert not folder.exists()


def test_disk_errors(trial: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"group_offload_to_disk_path — .*file/x cannot be used: .*Name a folder"):
        trial(group_offload_to_disk_path=str(tmp_path / "file/x"))


def test_a_full_disk(trial: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hooktuner_group_offload.rest.save_file", full)
    with pytest.raises(ModelError, match=r"cannot be written: .*No space left on device\. Make room there"):
        trial(group_offload_to_disk_path=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- changing


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_out_of_memory_streams_everything_once(trial: Make, kind: str) -> None:
    resident, one = trial(offload=False), trial(group_offload_type=kind, group_offload_resident_blocks=3)
    fail = one.model.blocks[3].register_forward_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        one.micro()
    fail.remove()
    before = one.offload.device_bytes()
    assert one.offload.out_of_memory() is True
    assert one.offload.resident_units == 0
    assert one.offload.device_bytes() < before
    assert "ran out of memory while 3 of 5 blocks stay on the device" in one.run.notes[-1]
    one.model.zero_grad(set_to_none=True)
    one.micro()
    resident.micro()
    resident.assert_same(one)
    assert one.offload.out_of_memory() is False


def test_out_of_memory_with_nothing_to_give(trial: Make) -> None:
    assert trial().offload.out_of_memory() is False


def test_a_later_choice_of_resident_blocks(trial: Make) -> None:
    """What measuring the memory of the first steps leads to; between steps, with the same results."""
    resident, one = trial(offload=False), trial()
    one.micro()
    one.offload._next = 3
    one.micro()
    assert one.offload.resident_units == 3
    one.micro()
    for _ in range(3):
        resident.micro()
    resident.assert_same(one)


def test_thawed_weights_are_refused(trial: Make) -> None:
    one = trial()
    one.offload.plan.groups[1].entries[0].parameter.requires_grad_(True)
    with pytest.raises(PluginError, match=r"blocks\.0\..* became trainable after its weights were offloaded"):
        one.micro()


def test_a_model_without_frozen_blocks(trial: Make, base: Any) -> None:
    from hooktuner_group_offload.strategy import Offload

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    model.text_blocks = nn.ModuleList()
    with pytest.raises(PluginError, match="the blocks of Module have no frozen weights"):
        Offload(base.run, model, GroupOffloadOptions()).place()


# ---------------------------------------------------------------------------------------------------- numbers


class Mark:
    """A CUDA event of known time in milliseconds."""

    def __init__(self, time: float) -> None:
        self.time = time

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Mark) -> float:
        return end.time - self.time


def test_the_meter_keeps_steps_apart() -> None:
    """On a GPU the numbers of a step are asked for after the next has begun."""
    meter = Meter()
    meter.copied(999)  # before the first step
    meter.open(1)
    meter.copied(10, (Mark(0), Mark(400)))
    meter.stalled((Mark(0), Mark(100)))
    meter.open(1)  # the second micro-batch
    meter.copied(5, (Mark(0), Mark(400)))
    meter.open(2)
    meter.copied(7, (Mark(0), Mark(1)))
    assert meter.report() == {"bytes_h2d": 15, "stall_seconds": 0.1, "hidden_fraction": 0.875}
    assert meter.report()["bytes_h2d"] == 7
    assert meter.report() == {"bytes_h2d": 0, "stall_seconds": 0.0, "hidden_fraction": 0.0}


def test_rollouts_count_for_their_step(trial: Make) -> None:
    """They come before the micro-step begins; the event tells which step it is."""
    one = trial()
    plugin = GroupOffload()
    plugin._offload = one.offload
    one.offload.report()
    plugin.on_event(StepStarted(5))
    with torch.no_grad():
        one.predict()
    one.step.number = 5
    one.micro()
    assert one.offload.report()["bytes_h2d"] > 2 * sum(group.nbytes for group in one.offload.plan.groups)
    assert one.offload.report()["bytes_h2d"] == 0


def test_a_transfer_bound_run_is_told_once() -> None:
    watch = TransferWatch("Do this.")
    slow = {"bytes_h2d": 3 * 2**30, "stall_seconds": 0.3, "hidden_fraction": 0.25}
    fast = {**slow, "stall_seconds": 0.0}
    assert [watch.look(fast, 1.0) for _ in range(5)] == [None] * 5
    told = [watch.look(slow, 1.0) for _ in range(5)]
    assert told[1] == (
        "group-offload: 20% of the time is spent waiting for weights (3.0 GiB per step, 25% of the copying is hidden). "
        "Do this."
    )
    assert [one for one in told if one] == [told[1]]


def test_a_transfer_bound_run_reaches_the_notes(trial: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial(group_offload_use_stream=False)
    times = iter(range(100))
    monkeypatch.setattr("hooktuner_group_offload.strategy.time.perf_counter", lambda: float(next(times)) + 1)
    slow = {"bytes_h2d": 2**30, "stall_seconds": 0.5, "hidden_fraction": 0.0}
    monkeypatch.setattr(one.offload.meter, "report", lambda: slow)
    for _ in range(5):
        one.offload.report()
    assert one.run.notes[-1].endswith('hidden). Set "group_offload_use_stream": true.')


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"group_offload_use_stream": False}, '"group_offload_use_stream": true'),
        ({"group_offload_to_disk_path": "x"}, "Remove group_offload_to_disk_path"),
        ({"group_offload_ring_depth": 1}, '"group_offload_ring_depth": 2'),
        ({"group_offload_resident_blocks": 0}, "Raise group_offload_resident_blocks"),
        ({"group_offload_type": "leaf_level"}, '"group_offload_type": "block_level"'),
        ({}, "Raise train_batch_size"),
    ],
)
def test_advice(options: dict[str, Any], advice: str) -> None:
    assert advice in _advice(GroupOffloadOptions(**options))
