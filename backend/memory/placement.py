"""Which slot a model goes to. Pure: bytes in, slot out; equal numbers always give the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotRoom:
    """The room on one slot at one moment.

    `free_bytes` is free now, `evictable_bytes` is used by idle models that could be evicted, `reserve_bytes` must stay free.
    `present_bytes` is the part of the model in question that is already on the slot; it is not part of the other numbers.
    """

    index: int
    total_bytes: int
    free_bytes: int
    evictable_bytes: int = 0
    reserve_bytes: int = 0
    present_bytes: int = 0

    def left_bytes(self, need_bytes: int) -> int:
        """Room left after using `need_bytes`, evicting if necessary; negative if it does not fit."""
        return self.free_bytes + self.evictable_bytes + self.present_bytes - self.reserve_bytes - need_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNeed:
    """A model to place: its weights, and the memory needed to run it."""

    name: str
    weights_bytes: int
    working_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.working_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a model goes. `slot_index` is None if there is no slot for it. `resident_bytes` of its weights stay there, the rest streams."""

    need: ModelNeed
    slot_index: int | None
    resident_bytes: int
    reason: str

    @property
    def is_whole(self) -> bool:
        return self.slot_index is not None and self.resident_bytes == self.need.weights_bytes


def select_slot(need: ModelNeed, rooms: Sequence[SlotRoom]) -> Placement:
    """The slot where the model and its working memory fit whole with the largest share of the card left.

    Prefers a slot that already has at least half of the model, then one where nothing must be evicted; ties go to the lower index. If it fits
    nowhere, the placement has no slot, and its reason has the numbers.
    """
    fitting = [room for room in rooms if room.left_bytes(need.total_bytes) >= 0]
    if not fitting:
        return Placement(need=need, slot_index=None, resident_bytes=0, reason=_explain_no_room(need, rooms))
    best = max(fitting, key=lambda room: _preference(need, room))
    left_bytes = best.left_bytes(need.total_bytes)
    reason = f"{need.name} on slot {best.index}: {need.total_bytes / MIB:.0f} MiB needed, {left_bytes / MIB:.0f} MiB left"
    return Placement(need=need, slot_index=best.index, resident_bytes=need.weights_bytes, reason=reason)


def plan_placements(needs: Sequence[ModelNeed], rooms: Sequence[SlotRoom]) -> tuple[Placement, ...]:
    """A slot for each model that one picture needs, in the given order. Models run one at a time, so a slot reserves only its largest working
    memory.

    Large models choose first. A model that fits nowhere whole gets the slot where the most of it can stay, and streams the rest. If not even its
    working memory fits, it gets no slot.
    """
    shares = {room.index: _Share(room) for room in rooms}
    order = sorted(range(len(needs)), key=lambda position: (-needs[position].total_bytes, position))
    chosen: dict[int, Placement] = {}
    for position in order:
        need = needs[position]
        placement = select_slot(need, [share.room_for(need) for share in shares.values()])
        if placement.slot_index is None:
            placement = _place_streamed(need, list(shares.values()), placement.reason)
        if placement.slot_index is not None:
            shares[placement.slot_index].take(placement)
        chosen[position] = placement
    return tuple(chosen[position] for position in range(len(needs)))


class _Share:
    """A slot's room while placing several models: weights add up, and only the largest working memory counts."""

    def __init__(self, room: SlotRoom) -> None:
        self.room = room
        self.weights_bytes = 0
        self.working_bytes = 0

    def room_for(self, need: ModelNeed) -> SlotRoom:
        """The room for `need`, whose work may use the working memory already set aside."""
        taken_bytes = self.weights_bytes + max(0, self.working_bytes - need.working_bytes)
        return replace(self.room, free_bytes=self.room.free_bytes - taken_bytes)

    def take(self, placement: Placement) -> None:
        self.weights_bytes += placement.resident_bytes
        self.working_bytes = max(self.working_bytes, placement.need.working_bytes)


def _place_streamed(need: ModelNeed, shares: Sequence[_Share], reason: str) -> Placement:
    def resident_bytes(share: _Share) -> int:
        return share.room_for(need).left_bytes(need.working_bytes)

    best = max(shares, key=lambda share: (resident_bytes(share), -share.room.index), default=None)
    if best is None or resident_bytes(best) < 0:
        return Placement(need=need, slot_index=None, resident_bytes=0, reason=reason)
    staying_bytes = min(need.weights_bytes, resident_bytes(best))
    return Placement(need=need, slot_index=best.room.index, resident_bytes=staying_bytes, reason=f"{reason}; streams on slot {best.room.index}")


def _preference(need: ModelNeed, room: SlotRoom) -> tuple[bool, bool, float, int]:
    is_home = need.weights_bytes > 0 and 2 * room.present_bytes >= need.weights_bytes
    nothing_leaves = room.left_bytes(need.total_bytes) >= room.evictable_bytes
    return is_home, nothing_leaves, room.left_bytes(need.total_bytes) / max(1, room.total_bytes), -room.index


def _explain_no_room(need: ModelNeed, rooms: Sequence[SlotRoom]) -> str:
    by_slot = ", ".join(f"slot {room.index} {max(0, room.left_bytes(0)) / MIB:.0f}" for room in rooms)
    together_bytes = sum(max(0, room.left_bytes(0)) for room in rooms)
    return (
        f"{need.name} fits on no slot whole: it needs {need.weights_bytes / MIB:.0f} MiB for weights and {need.working_bytes / MIB:.0f} MiB to run; "
        f"room in MiB: {by_slot or 'no slot'}; together {together_bytes / MIB:.0f}"
    )
