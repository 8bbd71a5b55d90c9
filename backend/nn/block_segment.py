"""A transformer block as a segment, with the hook that may replace it, and residuals counted from the first block. Shared by families of DiTs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from backend.nn.program import Addition, ControlLists, Program, ProgramState, Segment
from backend.nn.transformer_controlnet import as_tokens

Forward = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
Replacement = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Tensor]]
"""A hook in a block's place: (its arguments, {"original_block": the call, "block": the module}) -> its streams."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockSegment(Segment):
    """One block. `_run` advances the state; residuals are added after it."""

    def __call__(self, state: ProgramState, first_block: int = 0, end_block: int | None = None) -> None:
        state.options["block"] = self.key
        self._run(state)
        self.add_residuals(state, at_end=True)

    def _run(self, state: ProgramState) -> None:
        raise NotImplementedError

    def _add(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Residuals are tokens (B, L, D), or a picture of them (B, D, rows, columns)."""
        return super()._add(hidden, as_tokens(residual))

    def run_or_replace(self, state: ProgramState, args: Mapping[str, Any], forward: Forward) -> Mapping[str, Tensor]:
        """The block's streams after it, or what the hook patches_replace["dit"][("double_block", 3)] makes of them."""
        replace: Replacement | None = state.options.get("patches_replace", {}).get("dit", {}).get(self.key)
        if replace is None:
            return forward(args)
        return replace({**args, "transformer_options": state.options}, {"original_block": forward, "block": self.layers[0]})


def residuals_from_the_first(program: Program, control: ControlLists | None) -> dict[Addition, Tensor]:
    """Residuals by where they are added: entry i of a list belongs to block i."""
    found: dict[Addition, Tensor] = {}
    for addition in (one for segment in program.segments for one in segment.adds):
        residuals = (control or {}).get(addition.kind)
        if isinstance(residuals, (list, tuple)) and addition.number < len(residuals):
            residual = residuals[addition.number]
            if residual is not None:
                found[addition] = residual
    return found
