from __future__ import annotations

import math

import pytest

from backend.parallel.plan import Piece, Plan, ReplicaPlan, Stage

U_CUT = ReplicaPlan(pieces=(Piece(0), Piece(1, 0, 2), Piece(1, 2, None), Piece(2), Piece(3)), slots=(4, 4, 1, 1, 4))


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
    with pytest.raises(ValueError, match="without a replica"):
        Plan(strategy="single", replicas=(), reason="")


def test_speedup_is_against_one_slot() -> None:
    def speedup(strategy: str, step_ms: float, single_ms: float) -> float:
        return Plan(strategy=strategy, replicas=(U_CUT,), reason="", predicted_ms=step_ms, single_ms=single_ms).predicted_speedup  # type: ignore[arg-type]

    assert speedup("layers", 50.0, 75.0) == 1.5
    assert speedup("layers", 50.0, math.inf) == math.inf
    assert speedup("layers", 0.0, 0.0) == 1.0
    assert speedup("single", 75.0, math.inf) == 1.0


def test_pieces_name_themselves() -> None:
    assert [str(piece) for piece in U_CUT.pieces] == ["0", "1[0:2]", "1[2:]", "2", "3"]
