"""What runs where: the frozen decision that the planner makes and the executor carries out. Contains no tensors and knows no devices.

A plan names slots by index and pieces of the network by their position in its program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from backend.nn.piece import Piece as Piece

Strategy = Literal["single", "replicas", "tiles", "layers", "hybrid"]


class HasStrategy:
    """Properties of a strategy, so that no caller compares its name."""

    __slots__ = ()
    strategy: Strategy

    @property
    def is_single(self) -> bool:
        """One copy on one slot; ControlNets may run on other slots."""
        return self.strategy == "single"

    @property
    def is_replicated(self) -> bool:
        """Several copies, each complete on its own slot."""
        return self.strategy == "replicas"

    @property
    def is_tiled(self) -> bool:
        """Several copies, each complete on its own slot; teams of slots compute each row together."""
        return self.strategy == "tiles"

    @property
    def has_whole_copies(self) -> bool:
        """Several copies, each complete on its own slot."""
        return self.is_replicated or self.is_tiled

    @property
    def is_one_cut(self) -> bool:
        """One copy, cut over slots."""
        return self.strategy == "layers"

    @property
    def is_cut(self) -> bool:
        """At least one copy is cut over slots, so rows flow through stages."""
        return self.strategy in ("layers", "hybrid")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Consecutive pieces on one slot."""

    slot: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPlan:
    """One whole copy of the network: its pieces in the order they run, and the slot of each.

    A slot may appear more than once: in a U-cut one slot runs the first and the last pieces. Example: pieces 0, 1[0:2], 1[2:], 2 on slots
    0, 0, 1, 0.
    Raises: ValueError if pieces are out of order or one is missing.
    """

    pieces: tuple[Piece, ...]
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.pieces or len(self.pieces) != len(self.slots):
            raise ValueError(
                f"A replica of {len(self.pieces)} pieces was given {len(self.slots)} slots. A replica has at least one piece, and one slot per piece."
            )
        ends = [None, *self.pieces[:-1]]
        wrong = next((piece for before, piece in zip(ends, self.pieces) if not _follows(before, piece)), None)
        if wrong is None and self.pieces[-1].end_block is not None:
            wrong = self.pieces[-1]
        if wrong is not None:
            raise ValueError(
                f"A replica of the pieces {', '.join(map(str, self.pieces))} is wrong at {wrong}. A plan names every segment once, in order, with "
                "all of its blocks. Make the plan from this network's profile."
            )
        if min(self.slots) < 0:
            raise ValueError(f"A replica was put on slot {min(self.slots)}. Slots are numbered from 0, as in --device-id.")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Consecutive pieces on the same slot, in order."""
        runs = groupby(zip(self.pieces, self.slots), key=lambda placed: placed[1])
        return tuple(Stage(slot=slot, pieces=tuple(piece for piece, _ in run)) for slot, run in runs)

    @property
    def used_slots(self) -> tuple[int, ...]:
        """Each slot once, in order of first use."""
        return tuple(dict.fromkeys(self.slots))

    def pieces_on(self, slot: int) -> tuple[Piece, ...]:
        return tuple(piece for piece, where in zip(self.pieces, self.slots) if where == slot)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedWeights:
    """The weights of one slot's layers when not all of them may stay there.

    `budget_bytes` is the room for weights: those that stay, and the layers that are there only while they compute. `streamed_bytes` of weights
    come from main memory for every row of a cut copy, for every forward of a whole one. Example: 11.9 GB of layers in a room of 11.0 GB, of which
    0.1 GB is for the layer that computes: 10.9 GB stay and 1.0 GB streams.
    """

    budget_bytes: int
    streamed_bytes: int


def _follows(before: Piece | None, piece: Piece) -> bool:
    """Whether a piece begins where the previous one ends. The first piece begins the network."""
    if piece.end_block is not None and piece.end_block <= piece.first_block:
        return False
    if before is None or before.end_block is None:
        return (piece.segment, piece.first_block) == (0 if before is None else before.segment + 1, 0)
    return (piece.segment, piece.first_block) == (before.segment, before.end_block)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileTeam:
    """Slots that compute each of their rows together. `rows`: how many rows of latents or tokens each slot computes.

    Example: slots (0, 1), rows (40, 24) of 64 rows of latents. Raises: ValueError for a slot without rows, or twice.
    """

    slots: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.slots or len(self.slots) != len(self.rows) or len(set(self.slots)) != len(self.slots) or min(self.rows) < 1:
            raise ValueError(f"A team of the slots {self.slots} was given {self.rows} rows. Each slot is in a team once and has at least one row.")

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(count / sum(self.rows) for count in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(HasStrategy):
    """The decision for one sampling run.

    `predicted_ms` is the time of one step of all images, `single_ms` the same on the fastest single slot with room for the network (inf if no
    slot has room). `predicted_bytes` is the peak per slot, `crossing_bytes` what moves between slots per step. `lanes` is how many sampler
    loops run at once. `component_slots` is where the planner put networks that had no slot yet, `control_slots` where each ControlNet runs for
    each replica. With "tiles", `tiles` are the teams of slots, in the order of their replicas.
    `streamed`: by slot, what streams from main memory; empty if all weights stay on their slots, otherwise every slot that computes
    has an entry. `reason` is one sentence for the user.
    Raises: ValueError for a plan that contradicts itself.
    """

    strategy: Strategy
    replicas: tuple[ReplicaPlan, ...]
    reason: str
    predicted_ms: float = 0.0
    single_ms: float = 0.0
    predicted_bytes: Mapping[int, int] = field(default_factory=dict)
    crossing_bytes: int = 0
    lanes: int = 1
    component_slots: Mapping[str, int] = field(default_factory=dict)
    control_slots: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tiles: tuple[TileTeam, ...] = ()
    streamed: Mapping[int, StreamedWeights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.replicas:
            raise ValueError(f"A plan ({self.strategy}) has no replica. It needs at least one copy of the network.")
        fault = self._fault_of_replicas() or self._fault_of_tiles() or self._fault_of_lanes() or self._fault_of_controls()
        fault = fault or self._fault_of_streaming()
        if fault is not None:
            raise ValueError(f"A plan ({self.strategy}) {fault}.")

    def _fault_of_replicas(self) -> str | None:
        count, slots = len(self.replicas), [slot for replica in self.replicas for slot in replica.used_slots]
        if twice := sorted({slot for slot in slots if slots.count(slot) > 1}):
            return f"has slot {twice[0]} in two replicas; a slot computes for one replica"
        if (self.is_single or self.is_one_cut) is not (count == 1):
            return f"has {count} replicas; single and layers have one, replicas, tiles and hybrid have more"
        if not self.is_cut and any(len(replica.used_slots) > 1 for replica in self.replicas):
            return "has a replica over several slots; only layers and hybrid may"
        if len({replica.pieces[-1].segment for replica in self.replicas}) > 1:
            return "has replicas of different lengths; each must contain every segment of the network"
        return None

    def _fault_of_tiles(self) -> str | None:
        if self.is_tiled is not bool(self.tiles):
            return f"has {len(self.tiles)} teams of slots; tiles has at least one, the others have none"
        members = tuple(slot for team in self.tiles for slot in team.slots)
        if self.tiles and members != self.used_slots:
            return f"has teams of the slots {members}, but copies on {self.used_slots}; each team's copies come together, in the order of the teams"
        if len({sum(team.rows) for team in self.tiles}) > 1 or (self.tiles and len(members) == len(self.tiles)):
            return "has teams that cut rows of different lengths, or no team of several slots"
        return None

    def _fault_of_lanes(self) -> str | None:
        if self.lanes < 1 or (self.lanes > 1 and not self.is_cut):
            return f"has {self.lanes} lanes; there must be at least one, and more only if a copy is cut over slots"
        return None

    def _fault_of_controls(self) -> str | None:
        for name, slots in self.control_slots.items():
            if len(slots) != len(self.replicas):
                return f"has {len(slots)} slots for {name} and {len(self.replicas)} replicas; each replica needs one"
        return None

    def _fault_of_streaming(self) -> str | None:
        if self.streamed and set(self.streamed) != set(self.used_slots):
            return f"streams on the slots {sorted(self.streamed)} and computes on {sorted(self.used_slots)}; name every slot that computes, or none"
        if any(one.budget_bytes < 0 or one.streamed_bytes < 0 for one in self.streamed.values()):
            return "streams a negative number of bytes"
        return None

    @property
    def used_slots(self) -> tuple[int, ...]:
        """Slots that compute the network, each once, in order of first use."""
        return tuple(dict.fromkeys(slot for replica in self.replicas for slot in replica.used_slots))

    @property
    def has_control_elsewhere(self) -> bool:
        """Whether a ControlNet runs on a slot outside the replica it runs for."""
        return any(
            slot not in replica.used_slots for slots in self.control_slots.values() for replica, slot in zip(self.replicas, slots, strict=True)
        )

    @property
    def predicted_speedup(self) -> float:
        """Compared with one slot. 1.0 without a prediction; inf for a plan over several slots when no single slot has room for the network."""
        if self.is_single and not self.has_control_elsewhere:
            return 1.0
        return self.single_ms / self.predicted_ms if self.predicted_ms > 0 and self.single_ms > 0 else 1.0
