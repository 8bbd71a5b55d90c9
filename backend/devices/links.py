"""What is known about the link from one slot to another: its route and speed. Knows no test and no transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Route = Literal["same", "direct", "peer", "staged"]
"""same: one device, nothing moves. direct: one end is main memory, or both are virtual. peer: from card to card. staged: through main memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How tensors move from one slot to another, and why. Speeds are measured, or None.

    A tensor of n bytes takes about `latency_ms + n / bytes_per_ms`.
    """

    route: Route
    reason: str
    bytes_per_ms: float | None = None
    latency_ms: float | None = None

    def __str__(self) -> str:
        speed = "" if self.bytes_per_ms is None else f", {self.bytes_per_ms / 1e6:.1f} GB/s"
        return f"{self.route}{speed} ({self.reason})"


Verdicts = Mapping[tuple[int, int], Verdict]
"""By (source, target) slot index."""
