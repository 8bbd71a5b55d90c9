"""How many threads torch may use where one CPU slot computes on the threads of whoever calls it. With several slots each worker sets its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backend.args import BackendConfig
from backend.devices.slot import Slot


def apply_cpu_threads(config: BackendConfig, slots: Sequence[Slot]) -> None:
    """Do what --cpu-threads-per-slot says for a single CPU slot."""
    if config.cpu_threads_per_slot is not None and len(slots) == 1 and slots[0].cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads_per_slot)  # threads that begin later take this number
