"""One call of the network as a value: its inputs, and its rows. A row is one picture for one branch. Knows no devices, no plan and no family.

Shapes: B rows, then whatever the network takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backend.nn.deferred_control import DeferredControl, residual_rows
from backend.nn.program import ControlLists, Program, ProgramState, TransformerOptions

Control = ControlLists


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NetworkCall:
    """Inputs of a network, scaled and in its computation dtype. `options` are Forge's transformer options, shared until the state copies them.

    `rows`: every input by name; "x" is the noisy latents. The first dim of each is rows; an input with one row applies to all.
    `control` may be deferred: the runner then computes the residuals while it runs the call. Raises: ValueError for an input with a different
    number of rows.
    """

    rows: Mapping[str, Tensor]
    control: ControlLists | DeferredControl | None = None
    options: TransformerOptions = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "x" not in self.rows:
            raise ValueError(f"A call of the network got {', '.join(self.rows) or 'no inputs'} but no latents. Pass the latents as x.")
        allowed = (1, self.rows["x"].shape[0])
        for name, tensor in self.rows.items():
            if tensor.ndim == 0 or tensor.shape[0] not in allowed:
                raise ValueError(
                    f"A call of {allowed[1]} rows got {name} of shape {tuple(tensor.shape)}. The first dimension of every input must be "
                    f"{allowed[1]}, or 1 if it applies to all rows."
                )

    @property
    def num_rows(self) -> int:
        return self.rows["x"].shape[0]

    @property
    def device(self) -> torch.device:
        return self.rows["x"].device

    def start(self, program: Program) -> ProgramState:
        """The state before the first segment, on the inputs' device. Computes deferred residuals first."""
        if self.control is None:
            return program.start(self.rows, options=self.options)
        control = self.control.compute(self.device) if isinstance(self.control, DeferredControl) else self.control
        return program.start(self.rows, residuals=program.name_residuals(control), options=self.options)

    def take_rows(self, first: int, end: int) -> NetworkCall:
        """The call for rows [`first`, `end`) only, with options that describe these rows."""
        num_rows = self.num_rows
        if first == 0 and end == num_rows:
            return self
        return NetworkCall(
            rows={name: tensor if tensor.shape[0] == 1 else tensor[first:end] for name, tensor in self.rows.items()},
            control=None if self.control is None else _control_rows(self.control, first, end, num_rows),
            options=_options_of_rows(self.options, first, end, num_rows),
        )

    def on(self, device: torch.device, send: Callable[[Tensor, torch.device], Tensor]) -> NetworkCall:
        """The call with its inputs sent to `device`, except the control residuals, which go where they are added."""
        if device == self.device:
            return self
        return replace(self, rows={name: send(tensor, device) for name, tensor in self.rows.items()})


class Runner(Protocol):
    """Runs calls of a network outside the calling thread: a sampling session over several slots, or a network cut by hand."""

    @property
    def deferred_networks(self) -> frozenset[nn.Module]:
        """ControlNets whose residuals the runner computes itself, so that calls may defer them."""
        ...

    def run(self, call: NetworkCall) -> Tensor:
        """The network's output for all rows, on the call's device."""
        ...


def _control_rows(control: ControlLists | DeferredControl, first: int, end: int, num_rows: int) -> ControlLists | DeferredControl:
    return control.rows(first, end, num_rows) if isinstance(control, DeferredControl) else residual_rows(control, first, end, num_rows)


def _options_of_rows(options: TransformerOptions, first: int, end: int, num_rows: int) -> TransformerOptions:
    """Options that describe a part of the batch's rows. A condition is a chunk of as many rows as there are pictures."""
    kinds = options.get("cond_or_uncond")
    if not kinds:
        return options
    num_pictures = num_rows // len(kinds)
    described: dict[str, Any] = {name: list(numbers) for name, numbers in _describe_rows(tuple(kinds), first, end, num_pictures)}
    if isinstance(options.get("cond_mark"), Tensor):
        described["cond_mark"] = options["cond_mark"][first:end]
    if isinstance(options.get("sigmas"), Tensor) and (first % num_pictures or end % num_pictures):
        described["sigmas"] = options["sigmas"][first % num_pictures :][:1]
    return {**options, **described}


@lru_cache(maxsize=256)
def _describe_rows(kinds: tuple[int, ...], first: int, end: int, num_pictures: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What the rows are, by the options' names. The same in every step."""
    row_kinds = [kinds[row // num_pictures] for row in range(first, end)]
    aligned = first % num_pictures == 0 and end % num_pictures == 0
    return (
        ("cond_or_uncond", tuple(kinds[first // num_pictures : end // num_pictures] if aligned else row_kinds)),
        ("cond_indices", tuple(row for row, kind in enumerate(row_kinds) if kind == 0)),
        ("uncond_indices", tuple(row for row, kind in enumerate(row_kinds) if kind == 1)),
        ("picture_indices", tuple(row % num_pictures for row in range(first, end))),
    )
