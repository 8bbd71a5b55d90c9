"""Slots whose devices have died: finds them, gives them no more work, and names them in the error that ends a job.

Knows no plan and no network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from backend import memory_management
from backend.devices.slot import Slot
from backend.parallel.placing.fleet import Fleet, current_fleet
from backend.parallel.running.worker import SlotLost

logger = logging.getLogger(__name__)


@contextmanager
def dropping_dead_slots() -> Iterator[None]:
    """Around a job: if it fails because a device died, drop that device's slot and name it in the error.

    A slot's worker thread detects this by itself. This covers everything else a job does on devices: encoding, decoding, copies between them.
    Raises: SlotLost instead of the device's own error.
    """
    known = memory_management.lost_devices()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, SlotLost) or memory_management.is_out_of_memory(error):
            raise
        fleet = current_fleet()
        drop_dead_slots(fleet)
        lost = [SlotLost(slot, error) for slot in fleet.slots if slot.torch_device in memory_management.lost_devices() - known]
        if not lost:
            raise
        logger.error("%s", lost[0])
        raise lost[0] from error


def find_dead_slots(fleet: Fleet) -> list[SlotLost]:
    """Working slots whose devices fail even a trivial computation."""
    return [lost for lost in map(_probe, fleet.working_slots) if lost is not None]


def drop_dead_slots(fleet: Fleet) -> list[SlotLost]:
    """Drop the slots whose devices are dead. Returns them."""
    lost = find_dead_slots(fleet)
    lose_slots(fleet, lost)
    return lost


def lose_slots(fleet: Fleet, lost: Sequence[SlotLost]) -> None:
    """Give these slots no more work, and forget what was on their devices."""
    for one in lost:
        fleet.lose(one.slot.index)
        memory_management.lose_device(one.slot.torch_device)


def _probe(slot: Slot) -> SlotLost | None:
    """The error of a trivial computation on the slot's device; None if the device is alive."""
    try:
        torch.ones(1, device=slot.torch_device).add(1).cpu()
    except torch.AcceleratorError as error:
        return SlotLost(slot, error)
    except RuntimeError:  # out of memory, or anything else that a live device reports
        return None
    return None
