"""Sets torch's number of threads for a single CPU slot, which computes on its caller's thread. With several slots each worker sets its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.args import BackendConfig
from backend.devices.slot import Slot


def apply_cpu_threads(config: BackendConfig, slots: Sequence[Slot]) -> None:
    """Apply --cpu-threads-per-slot to a single CPU slot."""
    if config.cpu_threads_per_slot is not None and len(slots) == 1 and slots[0].cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads_per_slot)  # also the default for threads that start later
