"""Slots whose devices have stopped working: finding them, giving them no more work, and naming them in the error that ends a job.

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
    """Around a job: where an error ends it because a device stopped working, the slot is lost from now on, and the error says which.

    Work on a slot's own thread notices by itself; this is for all else a job does on devices: encoding, decoding, copies between them.
    Raises: SlotLost in place of the device's own error.
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
    """Working slots whose devices do not even do the least work."""
    return [lost for lost in map(_probe, fleet.working_slots) if lost is not None]


def drop_dead_slots(fleet: Fleet) -> list[SlotLost]:
    """Give no more work to slots that do not answer; which those are."""
    lost = find_dead_slots(fleet)
    lose_slots(fleet, lost)
    return lost


def lose_slots(fleet: Fleet, lost: Sequence[SlotLost]) -> None:
    """Give them no more work, and forget what was on their devices."""
    for one in lost:
        fleet.lose(one.slot.index)
        memory_management.lose_device(one.slot.torch_device)


def _probe(slot: Slot) -> SlotLost | None:
    """Why a slot's device does not even do the least work; None where it does."""
    try:
        torch.ones(1, device=slot.torch_device).add(1).cpu()
    except torch.AcceleratorError as error:
        return SlotLost(slot, error)
    except RuntimeError:  # no room, or anything else that a living device says
        return None
    return None
