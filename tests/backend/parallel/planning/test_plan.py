from __future__ import annotations

import math
from typing import Any

import pytest

from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan, Stage

U_CUT = ReplicaPlan(pieces=(Piece(0), Piece(1, 0, 2), Piece(1, 2, None), Piece(2), Piece(3)), slots=(4, 4, 1, 1, 4))
WHOLE = ReplicaPlan(pieces=(Piece(0), Piece(1), Piece(2), Piece(3)), slots=(0, 0, 0, 0))


def _whole_on(slot: int, num_pieces: int = 4) -> ReplicaPlan:
    return ReplicaPlan(pieces=tuple(map(Piece, range(num_pieces))), slots=(slot,) * num_pieces)


def test_stages_are_the_runs_on_one_slot() -> None:
    assert U_CUT.stages == (
        Stage(slot=4, pieces=(Piece(0), Piece(1, 0, 2))),
        Stage(slot=1, pieces=(Piece(1, 2, None), Piece(2))),
        Stage(slot=4, pieces=(Piece(3),)),
    )
    assert U_CUT.used_slots == (4, 1)
    assert U_CUT.pieces_on(1) == (Piece(1, 2, None), Piece(2))


def test_a_replica_needs_a_slot_per_piece() -> None:
    with pytest.raises(ValueError, match="2 pieces was given 1 slots"):
        ReplicaPlan(pieces=(Piece(0), Piece(1)), slots=(0,))
    with pytest.raises(ValueError, match="at least one piece"):
        ReplicaPlan(pieces=(), slots=())


def test_a_plan_needs_a_replica() -> None:
    with pytest.raises(ValueError, match="has no replica"):
        Plan(strategy="single", replicas=(), reason="")


def test_speedup_is_against_one_slot() -> None:
    def speedup(strategy: str, step_ms: float, single_ms: float) -> float:
        replica = U_CUT if strategy == "layers" else WHOLE
        return Plan(strategy=strategy, replicas=(replica,), reason="", predicted_ms=step_ms, single_ms=single_ms).predicted_speedup  # type: ignore[arg-type]

    assert speedup("layers", 50.0, 75.0) == 1.5
    assert speedup("layers", 50.0, math.inf) == math.inf
    assert speedup("layers", 0.0, 0.0) == 1.0
    assert speedup("single", 75.0, math.inf) == 1.0


def test_pieces_name_themselves() -> None:
    assert [str(piece) for piece in U_CUT.pieces] == ["0", "1[0:2]", "1[2:]", "2", "3"]


@pytest.mark.parametrize(
    "pieces",
    [
        (Piece(1), Piece(2)),  # the first is left out
        (Piece(0), Piece(2)),  # one between
        (Piece(0), Piece(1), Piece(1)),  # one twice
        (Piece(1), Piece(0)),  # another order
        (Piece(0), Piece(1, 0, 2), Piece(2)),  # the rest of a segment
        (Piece(0), Piece(1, 0, 2), Piece(1, 3, None)),  # a block between
        (Piece(0), Piece(1, 1, None)),  # the first block
        (Piece(0), Piece(1, 0, 0), Piece(1)),  # a part of nothing
        (Piece(0), Piece(1, 0, 2)),  # the end
    ],
    ids=lambda pieces: " ".join(map(str, pieces)),
)
def test_pieces_are_complete_and_in_order(pieces: tuple[Piece, ...]) -> None:
    with pytest.raises(ValueError, match="names every segment once, in order"):
        ReplicaPlan(pieces=pieces, slots=(0,) * len(pieces))


def test_slots_are_numbered_from_0() -> None:
    with pytest.raises(ValueError, match="slot -1"):
        ReplicaPlan(pieces=(Piece(0),), slots=(-1,))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"strategy": "replicas", "replicas": (_whole_on(0), _whole_on(0))}, "slot 0 in two replicas"),
        ({"strategy": "hybrid", "replicas": (U_CUT, ReplicaPlan(pieces=WHOLE.pieces, slots=(0, 1, 0, 0)))}, "slot 1 in two replicas"),
        ({"strategy": "single", "replicas": (_whole_on(0), _whole_on(1))}, "has 2 replicas; single and layers have one"),
        ({"strategy": "layers", "replicas": (_whole_on(0), _whole_on(1))}, "has 2 replicas; single and layers have one"),
        ({"strategy": "replicas", "replicas": (_whole_on(0),)}, "has 1 replicas; single and layers have one"),
        ({"strategy": "single", "replicas": (U_CUT,)}, "over several slots"),
        ({"strategy": "replicas", "replicas": (U_CUT, _whole_on(0))}, "over several slots"),
        ({"strategy": "replicas", "replicas": (_whole_on(0), _whole_on(1, 3))}, "different lengths"),
        ({"strategy": "layers", "replicas": (U_CUT,), "lanes": 0}, "has 0 lanes"),
        ({"strategy": "replicas", "replicas": (_whole_on(0), _whole_on(1)), "lanes": 2}, "has 2 lanes"),
        ({"strategy": "single", "replicas": (WHOLE,), "control_slots": {"ControlNet": (0, 1)}}, "2 slots for ControlNet and 1 replicas"),
        ({"strategy": "replicas", "replicas": (_whole_on(0), _whole_on(1)), "control_slots": {"ControlNet": (1,)}}, "1 slots for ControlNet"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Plan(reason="", **fields)


def test_strategies_answer_for_themselves() -> None:
    hybrid = Plan(strategy="hybrid", replicas=(U_CUT, _whole_on(0)), reason="", lanes=2)
    layers = Plan(strategy="layers", replicas=(U_CUT,), reason="", lanes=2, control_slots={"ControlNet": (1,)})
    replicas, single = (
        Plan(strategy="replicas", replicas=(_whole_on(0), _whole_on(1)), reason=""),
        Plan(strategy="single", replicas=(WHOLE,), reason=""),
    )
    assert [(plan.is_single, plan.is_replicated, plan.is_one_cut, plan.is_cut) for plan in (single, replicas, layers, hybrid)] == [
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, True),
        (False, False, False, True),
    ]
