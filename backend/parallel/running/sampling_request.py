"""What a sampling run asks for, as a value. Knows no slots and no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from backend.parallel.planning.planner import WantedStrategy


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """`branches`: conditions per picture and step. `strategy`: auto, replicas, tiles, layers, hybrid or single.

    Example: two pictures with CFG (four rows per step) are `SamplingRequest(images=2, branches=2)`.
    """

    images: int = 1
    branches: int = 2
    steps: int = 20
    strategy: WantedStrategy = "auto"
    asynchronous: bool = True
    may_use_lanes: bool = False
    is_cancelled: Callable[[], bool] = field(default=lambda: False)

    @property
    def num_rows(self) -> int:
        """Rows of a step."""
        return self.images * self.branches

    @property
    def may_divide(self) -> bool:
        """Whether more than one slot may work on it."""
        return self.strategy != "single"

    @property
    def is_free(self) -> bool:
        """Whether the planner chooses the strategy."""
        return self.strategy == "auto"
