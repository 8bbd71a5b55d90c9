"""An entry in the list of samplers. Must not know the list, nor the sampler that an entry creates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from backend.sampling.registry import SamplerSpec


class SamplerData(NamedTuple):
    """An entry of the list. `constructor(model)` creates the sampler."""

    name: str
    constructor: Callable[[Any], Any]
    aliases: list[str]
    options: dict[str, Any]

    def total_steps(self, steps: int) -> int:
        """Number of model calls: second-order samplers make two per step."""
        return steps * 2 if self.options.get("second_order", False) else steps


def entry_of(spec: SamplerSpec, constructor: Callable[[Any], Any]) -> SamplerData:
    """The entry of a built-in sampler."""
    return SamplerData(spec.name, constructor, list(spec.aliases), dict(spec.options))
