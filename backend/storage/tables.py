"""Small constant tables that formats look numbers up in, kept on each device that uses them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_KEPT_ON = ("cpu", "cuda", "xpu", "mps")
"""Virtual GPUs come and go, and their memory is counted, so a table is copied to them each time."""

MakeTable = Callable[[], Tensor]


def table_on(make: MakeTable, device: torch.device) -> Tensor:
    """The table that `make`, a function of a module, returns, on `device`. Do not change it."""
    return _kept(make, device) if device.type in _KEPT_ON else _kept(make, torch.device("cpu")).to(device)


@cache
def _kept(make: MakeTable, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return make().to(device)
