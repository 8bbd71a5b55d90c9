"""What a plan is made for (`JobShape`), one that fits (`Candidate`), and rows dealt by speed. Passive data and arithmetic."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from backend.parallel.planning.costs import ComponentCost
from backend.parallel.planning.pipeline import StepRows
from backend.parallel.planning.plan import HasStrategy, ReplicaPlan, Strategy, StreamedWeights, TileTeam

LEAST_GAIN = 1.05
"""A plan over several slots is used only if it is predicted to be this much faster than one slot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobShape:
    """What a sampling run asks for.

    `branches` per image: 2 with CFG, 1 without. `may_use_lanes`: each image may have its own sampler loop. `components` are networks whose slot
    the planner chooses; a network that is already placed is part of its slot's `fixed_bytes` instead. A ControlNet among them (`runs_per_row`)
    is copied with every whole copy or runs on one slot for all of them, whichever is faster. If a copy is cut, the ControlNet runs on
    `control_slot`, or on the best slot if that is None.
    `rows_per_forward`: rows that a whole copy takes at once; a stage takes one. Cuts respect `max_crossing_bytes` per step if the other rules
    allow it. `why_no_tiles`: why rows of this run cannot be cut into tiles; None if they can. `exact_share`: share of the steps in which tiles wait
    for what they send each other; in the others they use what was sent in the step before.
    """

    images: int = 1
    branches: int = 2
    steps: int = 20
    may_use_lanes: bool = True
    components: tuple[ComponentCost, ...] = ()
    rows_per_forward: int = 2
    max_crossing_bytes: int | None = None
    control_slot: int | None = None
    is_async: bool = True
    why_no_tiles: str | None = None
    exact_share: float = 1.0

    @property
    def num_rows(self) -> int:
        return self.images * self.branches

    @property
    def step_rows(self) -> StepRows:
        return StepRows(images=self.images, branches=self.branches, has_lanes=self.may_use_lanes)

    @property
    def control_networks(self) -> tuple[ComponentCost, ...]:
        """Components that run for every row."""
        return tuple(component for component in self.components if component.runs_per_row)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate(HasStrategy):
    """One plan that fits."""

    strategy: Strategy
    groups: tuple[tuple[int, ...], ...]
    replicas: tuple[ReplicaPlan, ...]
    step_ms: float
    peak_bytes: dict[int, int]
    crossing_bytes: int
    component_slots: dict[str, int]
    dealt: tuple[int, ...]
    control_slots: dict[str, tuple[int, ...]] = field(default_factory=dict)
    imbalance: float = 0.0
    tiles: tuple[TileTeam, ...] = ()
    streamed: Mapping[int, StreamedWeights] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        return len({slot for group in self.groups for slot in group}.union(*self.control_slots.values()))

    @property
    def shared_control_slots(self) -> dict[str, int]:
        """ControlNets that run on one slot for all copies, unless that is the slot of the only copy."""
        return {name: slots[0] for name, slots in self.control_slots.items() if len(set(slots)) == 1 and (slots[0],) != self.slot_indexes}

    @property
    def slot_indexes(self) -> tuple[int, ...]:
        return tuple(sorted(slot for group in self.groups for slot in group))


def deal_by_speed(num_rows: int, speeds: Sequence[float], busy_ms: Sequence[float] = ()) -> tuple[int, ...]:
    """Rows per replica such that the last row is done as early as possible. A tie goes to the lower index.

    `busy_ms`: how long each replica is busy before its first row, in the time unit of 1 / speed. Each row in turn goes to the replica that
    would finish it first, which is optimal for equal rows at different speeds. Example: 4 rows at speeds 1.0 and 0.6 -> (3, 1).
    Raises: ValueError without a replica, or for a speed that is not positive.
    """
    if not speeds or not all(speed > 0 for speed in speeds):
        raise ValueError(f"{num_rows} rows cannot be dealt by the speeds {list(speeds)}. Give at least one speed, and only speeds above 0.")
    dealt = [0] * len(speeds)
    starts = busy_ms or [0.0] * len(speeds)
    heap = [(starts[index] + 1.0 / speed, index) for index, speed in enumerate(speeds)]
    heapq.heapify(heap)
    for _ in range(num_rows):
        _, index = heapq.heappop(heap)
        dealt[index] += 1
        heapq.heappush(heap, (starts[index] + (dealt[index] + 1) / speeds[index], index))
    return tuple(dealt)
