"""Made-up costs and slots for tests of planning."""

from __future__ import annotations

from collections.abc import Sequence

from backend.nn.piece import Piece
from backend.parallel.planning.costs import ModelProfile, PieceCost, TakenSkip
from backend.parallel.planning.slot_facts import Link, SlotFacts

GB = 10**9
ROW_MS = 100.0
"""Time of one row of any made-up network on a slot of speed 1."""


def make_profile(works: Sequence[float], weights: Sequence[int] | None = None, *, num_skips: int = 0, state_bytes: int = 1000) -> ModelProfile:
    """One piece per work value. The first `num_skips` pieces each produce a skip, the last ones consume them, last in first out."""
    count = len(works)
    weights = weights or [10**6] * count
    pieces = tuple(
        PieceCost(
            piece=Piece(index),
            weight_bytes=weights[index],
            flops_per_row=work,
            work_per_row=work,
            num_kernels=1,
            hidden_bytes_per_row=state_bytes,
            skip_bytes_per_row=state_bytes if index < num_skips else 0,
            takes=(TakenSkip(count - 1 - index, state_bytes),) if index >= count - num_skips else (),
            control_bytes_per_row=state_bytes if index >= count - num_skips else 0,
            working_bytes_per_row=2 * state_bytes,
        )
        for index, work in enumerate(works)
    )
    return ModelProfile(
        name="network",
        pieces=pieces,
        embedding_bytes=0,
        emb_bytes_per_row=0,
        context_bytes_per_row=100,
        latent_bytes_per_row=10,
        output_bytes_per_row=10,
    )


def make_slot(
    profile: ModelProfile, index: int, *, speed: float = 1.0, budget_bytes: int = 100 * GB, total_bytes: int = 100 * GB, **facts: object
) -> SlotFacts:
    """A slot that takes ROW_MS / speed per row of that network."""
    work_per_ms = profile.work_per_row / ROW_MS
    return SlotFacts(index=index, speed=speed * work_per_ms, budget_bytes=budget_bytes, total_bytes=total_bytes, **facts)  # type: ignore[arg-type]


def fast_links(count: int) -> tuple[Link, ...]:
    """Links with negligible times."""
    return tuple(
        Link(source=one, target=other, bytes_per_ms=1e15, latency_ms=0.0) for one in range(count) for other in range(count) if one != other
    )  # fmt: skip
