"""What a sampling run asks for, as a value. Knows no slots and no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from backend.parallel.planning.planner import WantedStrategy


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """`branches`: conditions per picture and step. `strategy`: auto, replicas, tiles, layers, hybrid or single. `displaced_after`: tiles wait for
    each other in so many first steps, and then use what was sent in the step before; None if they always wait. `calls_per_step`: of the network.
    `graphs`: whether launches of stages are recorded and replayed where a device can, as `--cuda-graphs` says it.

    Example: two pictures with CFG (four rows per step) are `SamplingRequest(images=2, branches=2)`.
    """

    images: int = 1
    branches: int = 2
    steps: int = 20
    strategy: WantedStrategy = "auto"
    asynchronous: bool = True
    may_use_lanes: bool = False
    displaced_after: int | None = None
    calls_per_step: int = 1
    graphs: str = "off"
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


def foresee_calls(wrapper: object, shape: Sequence[int], request: SamplingRequest) -> tuple[tuple[int, ...], SamplingRequest]:
    """Shape (B, C, H, W) and rows of the network's calls, where a wrapper of the UNet function calls it with parts of the latents.

    Such a wrapper has a method `parts_of(height, width)`: how many parts of each picture a call takes, and their rows and columns of latents.
    Pictures then share their calls, so each cannot have a sampler loop of its own.
    Example: 9 parts of 64x64 of one picture of 160x160, without CFG: 9 rows of 64x64 instead of one of 160x160.
    """
    parts_of = getattr(wrapper, "parts_of", None)
    count, height, width = parts_of(*shape[2:]) if parts_of is not None else (1, *shape[2:])
    if (height, width) == tuple(shape[2:]):
        return tuple(shape), request
    return (count * shape[0], shape[1], height, width), replace(request, images=count * request.images, may_use_lanes=False)
