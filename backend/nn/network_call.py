"""One call of the network as a value: what goes in, and its rows. A row is a unit: one picture for one branch. Knows no devices and no plan.

Shapes: B rows, C channels, H W latent rows and columns, L tokens, D width of a token, V width of SDXL's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from backend.nn.deferred_control import DeferredControl, residual_rows
from backend.nn.unet_program import Program
from backend.nn.unet_state import TransformerOptions, UNetState

Control = Mapping[str, Sequence[Tensor | None]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NetworkCall:
    """Inputs of the UNet, scaled and in the type it computes in. `options` are Forge's transformer options, shared until the state copies them.

    `control` may be deferred: whoever runs the call computes the residuals beside it.
    """

    x_BCHW: Tensor
    timesteps_B: Tensor
    context_BLD: Tensor | None = None
    y_BV: Tensor | None = None
    control: Control | DeferredControl | None = None
    options: TransformerOptions = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.x_BCHW.shape[0]

    @property
    def device(self) -> torch.device:
        return self.x_BCHW.device

    def start(self, program: Program) -> UNetState:
        """The state before the first segment, on the device that the inputs are on. Deferred residuals are computed first."""
        control = self.control.compute(self.device) if isinstance(self.control, DeferredControl) else self.control
        return program.start(self.x_BCHW, self.timesteps_B, self.context_BLD, y_BV=self.y_BV, control=control, options=self.options)

    def rows(self, first: int, end: int) -> NetworkCall:
        """The call for rows `first` to before `end` alone; its options say what these rows are."""
        if first == 0 and end == self.num_rows:
            return self
        part = slice(first, end)
        return NetworkCall(
            x_BCHW=self.x_BCHW[part],
            timesteps_B=self.timesteps_B[part],
            context_BLD=None if self.context_BLD is None else self.context_BLD[part],
            y_BV=None if self.y_BV is None else self.y_BV[part],
            control=_control_rows(self.control, first, end, self.num_rows),
            options=_options_of_rows(self.options, first, end, self.num_rows),
        )

    def on(self, device: torch.device, send: Callable[[Tensor, torch.device], Tensor]) -> NetworkCall:
        """The call with its tensors sent to `device`, all but the ControlNet's residuals, which each go where they are added."""
        if device == self.device:
            return self
        return replace(
            self,
            x_BCHW=send(self.x_BCHW, device),
            timesteps_B=send(self.timesteps_B, device),
            context_BLD=None if self.context_BLD is None else send(self.context_BLD, device),
            y_BV=None if self.y_BV is None else send(self.y_BV, device),
        )


def _control_rows(control: Control | DeferredControl | None, first: int, end: int, num_rows: int) -> Control | DeferredControl | None:
    if control is None:
        return None
    return control.rows(first, end, num_rows) if isinstance(control, DeferredControl) else residual_rows(control, first, end, num_rows)


def _options_of_rows(options: TransformerOptions, first: int, end: int, num_rows: int) -> TransformerOptions:
    """Options whose description of the batch holds for a part of its rows. A condition is a chunk of as many rows as there are pictures."""
    kinds = options.get("cond_or_uncond")
    if not kinds:
        return options
    num_pictures = num_rows // len(kinds)
    row_kinds = [kinds[row // num_pictures] for row in range(first, end)]
    aligned = first % num_pictures == 0 and end % num_pictures == 0
    described = {
        "cond_or_uncond": kinds[first // num_pictures : end // num_pictures] if aligned else row_kinds,
        "cond_indices": [row for row, kind in enumerate(row_kinds) if kind == 0],
        "uncond_indices": [row for row, kind in enumerate(row_kinds) if kind == 1],
    }
    if isinstance(options.get("cond_mark"), Tensor):
        described["cond_mark"] = options["cond_mark"][first:end]
    if isinstance(options.get("sigmas"), Tensor) and not aligned:
        described["sigmas"] = options["sigmas"][first % num_pictures :][:1]
    return {**options, **described}
