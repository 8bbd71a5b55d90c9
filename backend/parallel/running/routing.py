"""The route of rows through one replica: its stages, and which tensors each sends to which slots. Derived only from the program's declarations.

Example: a UNet whose pieces are on slots 0, 1, 0 (a U-cut). Stage 0 sends its hidden state to slot 1. Its skips stay on slot 0, or go to slot 1
if the output segment that reads them is there. Stage 1 reads "hidden"; stage 2 reads "hidden" and the skips of stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from backend.nn.program import Addition, Program, trace_tensors
from backend.parallel.planning.plan import Piece, ReplicaPlan
from backend.parallel.running.residuals import ControlPlace


@dataclass(frozen=True, kw_only=True, slots=True)
class Replica:
    """A resident copy of the network: its program, whose weights are where `plan` says. `controls`: where each ControlNet, keyed by its own
    network, runs for this replica."""

    program: Program
    plan: ReplicaPlan
    work_per_row: Mapping[Piece, float] = field(default_factory=dict)
    controls: Mapping[nn.Module, ControlPlace] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Leaving:
    """A tensor that other stages read. `is_read_here`: whether the stage that sends it reads it too."""

    name: str
    slots: tuple[int, ...]
    is_read_here: bool


@dataclass(frozen=True, slots=True)
class RouteStage:
    """Consecutive pieces on one slot. `leaves`: for each piece, what is sent after it. `reads`: tensors of other stages, by name, and whether
    this is the last stage on its slot that reads them."""

    slot: int
    device: torch.device
    pieces: tuple[Piece, ...]
    leaves: tuple[tuple[Leaving, ...], ...]
    reads: Mapping[str, bool]
    runs: tuple[tuple[tuple[Piece, ...], tuple[Leaving, ...]], ...] = field(init=False)
    """The pieces in runs of as many as possible, each with what is sent after it: nothing is sent in the middle of a run."""

    def __post_init__(self) -> None:
        ends = [place + 1 for place, leaving in enumerate(self.leaves) if leaving or place + 1 == len(self.pieces)]
        object.__setattr__(self, "runs", tuple((self.pieces[first:end], self.leaves[end - 1]) for first, end in zip([0, *ends], ends)))


@dataclass(frozen=True, slots=True)
class Route:
    """Stages in order, the devices of their slots, what `Program.start` sends to stages other than the first, and the slot that adds each
    control residual."""

    replica: Replica
    stages: tuple[RouteStage, ...]
    devices: Mapping[int, torch.device]
    start_leaves: tuple[Leaving, ...]
    addition_slots: Mapping[Addition, int]
    _work: dict[int, float] = field(default_factory=dict)

    def work_of_stage(self, stage: int) -> float:
        """Work of a row in a stage, as the replica counts it."""
        if stage not in self._work:
            self._work[stage] = sum(self.replica.work_per_row.get(piece, 0.0) for piece in self.stages[stage].pieces)
        return self._work[stage]


def make_route(replica: Replica, device_of: Callable[[int], torch.device]) -> Route:
    """The route of a replica whose slots have these devices."""
    program, plan = replica.program, replica.plan
    stage_of = [number for number, stage in enumerate(plan.stages) for _ in stage.pieces]
    stage_slots = [stage.slot for stage in plan.stages]
    leaves: dict[int, list[Leaving]] = {}
    reads: list[dict[str, bool]] = [{} for _ in stage_slots]
    for reading in trace_tensors(program, plan.pieces):
        home = stage_of[max(reading.source, 0)]
        readers = list(dict.fromkeys(stage_of[piece] for piece in reading.readers))
        others = [number for number in readers if number != home]
        if others:
            slots = tuple(dict.fromkeys(stage_slots[number] for number in others))
            leaves.setdefault(reading.source, []).append(Leaving(reading.name, slots, home in readers))
        for number in others:
            reads[number][reading.name] = not any(later > number and stage_slots[later] == stage_slots[number] for later in others)
    first = 0
    stages = []
    for number, stage in enumerate(plan.stages):
        behind = tuple(tuple(leaves.get(piece, ())) for piece in range(first, first + len(stage.pieces)))
        stages.append(RouteStage(stage.slot, device_of(stage.slot), stage.pieces, behind, reads[number]))
        first += len(stage.pieces)
    return Route(
        replica, tuple(stages), {slot: device_of(slot) for slot in plan.used_slots}, tuple(leaves.get(-1, ())),
        _addition_slots(program, plan.pieces, plan.slots),
    )  # fmt: skip


def _addition_slots(program: Program, pieces: Sequence[Piece], slots: Sequence[int]) -> dict[Addition, int]:
    return {addition: slot for piece, slot in zip(pieces, slots) for addition in program.flow(piece).adds}
