"""How many threads torch may use where one CPU slot computes on the threads of whoever calls it. With several slots each worker sets its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from backend.args import BackendConfig
from backend.devices.slot import Slot

log = logging.getLogger(__name__)


def apply_cpu_threads(config: BackendConfig, slots: Sequence[Slot]) -> None:
    """Do what --cpu-threads-per-slot says for a single CPU slot, or say that no slot computes on the CPU."""
    threads = config.cpu_threads_per_slot
    if threads is None:
        return
    if all(slot.cpu_threads is None for slot in slots):
        log.warning("--cpu-threads-per-slot %d has no effect: no slot computes on the CPU.", threads)
    elif len(slots) == 1:
        torch.set_num_threads(threads)  # threads that begin later take this number
