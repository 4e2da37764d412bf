"""A small ring of device buffers, and the decision what to copy into them next.

`acquire` makes a group's parameters views into a buffer, `release` gives the buffer up. Contents stay until the buffer
is needed for another group, so the groups around a turn (end of the forward pass, end of a step) are not copied twice.

What comes next is learned: after each (direction, group) the ring remembers which came after it the last time, and
copies those ahead into buffers that nobody holds. Before it has seen anything it guesses the neighbour in the
direction of travel. A wrong guess costs a copy and nothing else: a group that is not there is copied when it is asked
for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from hooktuner_group_offload.device import Device, Slot
from hooktuner_group_offload.layout import Group

Place = tuple[bool, int]
"""(whether travelling backward, number of the group)."""


class Ring:
    """`depth` buffers for `groups`, given in the order of the forward pass. `ahead`: copy what comes next, too."""

    def __init__(self, device: Device, depth: int, *, ahead: bool) -> None:
        self._device = device
        self._depth = depth
        self._ahead = ahead
        self._groups: list[Group] = []
        self._number: dict[Group, int] = {}
        self._slots: list[Slot] = []
        self._slot_of: dict[Group, Slot] = {}
        self._storages: dict[int, Slot] = {}
        self._after: dict[Place, Place] = {}
        self._last: Place | None = None
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def rebuild(self, groups: Sequence[Group]) -> None:
        """Serve these groups from now on. Nothing may be held."""
        self.clear()
        self._groups = list(groups)
        self._number = {group: number for number, group in enumerate(groups)}
        largest = max((group.nbytes for group in groups), default=0)
        for _ in range(min(self._depth, len(groups))):
            slot = Slot(self._device.allocate(largest))
            self._slots.append(slot)
            self._storages[slot.buffer.untyped_storage().data_ptr()] = slot
        for group in groups:
            self._device.absent(group)

    def clear(self) -> None:
        """Forget groups and give the buffers back."""
        for slot in self._slots:
            assert slot.users == 0, "a group is still in use"
            if slot.group is not None:
                self._device.hold(slot)  # a copy that is under way must not outlive the buffer
                self._device.absent(slot.group)
        self._groups, self._number, self._slots = [], {}, []
        self._slot_of, self._storages, self._after, self._last = {}, {}, {}, None

    def serves(self, group: Group) -> bool:
        """Whether the group is one of the ring's (and not resident)."""
        return group in self._number

    def acquire(self, group: Group, *, backward: bool) -> Slot:
        """Let the group's parameters be on the device until `release`; copies it where it is not there yet."""
        slot = self._slot_of.get(group)
        if slot is None:
            slot = self._claim({group})
            if slot is None:
                held = ", ".join(other.group.name for other in self._slots if other.group is not None)
                raise RuntimeError(f"group-offload: no buffer is free for {group.name}; held are {held}")
            self._fill(slot, group)
        self._device.hold(slot)
        slot.users += 1
        self._clock += 1
        slot.used = self._clock
        group.bind(slot.buffer)
        here = (backward, self._number[group])
        if self._last is not None and self._last != here:
            self._after[self._last] = here
        self._last = here
        if self._ahead:
            self._look_ahead(here)
        return slot

    def release(self, group: Group) -> None:
        """One `acquire` less; without any the parameters leave the buffer, and it may be filled again."""
        slot = self._slot_of[group]
        slot.users -= 1
        if slot.users == 0:
            self._device.release(slot)
            self._device.absent(group)

    def owner(self, tensor: Tensor) -> Group | None:
        """The group in whose buffer the tensor's values lie, if any."""
        slot = self._storages.get(tensor.untyped_storage().data_ptr())
        return None if slot is None else slot.group

    def buffer(self, group: Group) -> Tensor:
        """The flat bytes of a group that is held."""
        return self._slot_of[group].buffer

    def in_use(self) -> list[Group]:
        """Groups that are held."""
        return [slot.group for slot in self._slots if slot.users and slot.group is not None]

    # ------------------------------------------------------------------------------------------------- decisions

    def _look_ahead(self, here: Place) -> None:
        wanted, place = {self._groups[here[1]]}, here
        for _ in range(2 * self._depth):  # the way may lead back over groups that are there already
            place = self._after.get(place) or self._neighbour(place)
            group = self._groups[place[1]]
            if group in wanted:
                continue
            if len(wanted) == self._depth:
                return
            wanted.add(group)
            if group not in self._slot_of:
                slot = self._claim(wanted)
                if slot is None:
                    return
                self._fill(slot, group)

    def _neighbour(self, place: Place) -> Place:
        backward, number = place
        last = len(self._groups) - 1
        if backward:
            return (True, number - 1) if number > 0 else (False, 0)
        return (False, number + 1) if number < last else (True, last)

    def _claim(self, keep: Collection[Group]) -> Slot | None:
        """A slot to fill: an empty one, else the one that nobody holds or wants and that was used longest ago."""
        free = [slot for slot in self._slots if slot.users == 0 and (slot.group is None or slot.group not in keep)]
        return min(free, key=lambda slot: (slot.group is not None, slot.used), default=None)

    def _fill(self, slot: Slot, group: Group) -> None:
        if slot.group is not None:
            del self._slot_of[slot.group]
        slot.group = group
        self._slot_of[group] = slot
        self._device.fill(slot, group)
