"""What runs where: the frozen decision that the planner makes and the executor carries out. Holds no tensors and knows no devices.

A plan names slots by their index and pieces of the network by their place in its program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from backend.nn.piece import Piece as Piece

Strategy = Literal["single", "replicas", "layers", "hybrid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Consecutive pieces on one slot."""

    slot: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaPlan:
    """One whole copy of the network: its pieces in the order they run, and the slot of each.

    A slot may come more than once: in a U-cut it has the first and the last pieces.
    """

    pieces: tuple[Piece, ...]
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.pieces or len(self.pieces) != len(self.slots):
            raise ValueError(
                f"A replica of {len(self.pieces)} pieces was given {len(self.slots)} slots; each piece needs one, and there is at least one piece."
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Runs of pieces between two changes of slot, in order."""
        runs = groupby(zip(self.pieces, self.slots), key=lambda placed: placed[1])
        return tuple(Stage(slot=slot, pieces=tuple(piece for piece, _ in run)) for slot, run in runs)

    @property
    def used_slots(self) -> tuple[int, ...]:
        """Each slot once, in the order of first use."""
        return tuple(dict.fromkeys(self.slots))

    def pieces_on(self, slot: int) -> tuple[Piece, ...]:
        return tuple(piece for piece, where in zip(self.pieces, self.slots) if where == slot)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The decision for one sampling run.

    `predicted_ms` is the time of one step of all the images, `single_ms` the same on the fastest single slot that holds the network (inf
    where none does). `predicted_bytes` is the peak per slot, `crossing_bytes` what goes from slot to slot in a step. `lanes` is how many
    sampler loops run side by side. `component_slots` says where the planner put networks whose slot was open, `control_slots` where each
    ControlNet runs for each of the replicas. `reason` is one sentence for the user.
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

    def __post_init__(self) -> None:
        if not self.replicas:
            raise ValueError(f"A plan ({self.strategy}) was made without a replica; there must be at least one copy of the network.")

    @property
    def used_slots(self) -> tuple[int, ...]:
        """Slots that compute the network, each once, in the order of first use."""
        return tuple(dict.fromkeys(slot for replica in self.replicas for slot in replica.used_slots))

    @property
    def has_control_apart(self) -> bool:
        """Whether a ControlNet runs on another slot than those of the replica that it runs for."""
        return any(
            slot not in replica.used_slots for slots in self.control_slots.values() for replica, slot in zip(self.replicas, slots, strict=True)
        )

    @property
    def predicted_speedup(self) -> float:
        """Against one slot; 1.0 where nothing is predicted, inf for a plan over several slots of a network that fits none of them."""
        if self.strategy == "single" and not self.has_control_apart:
            return 1.0
        return self.single_ms / self.predicted_ms if self.predicted_ms > 0 and self.single_ms > 0 else 1.0
