"""Bytes a device may use for weights. Pure numbers."""

from __future__ import annotations

GIB = 2**30
DEFAULT_INFERENCE_BYTES = GIB
"""Kept for activations while a model is in use, unless the user's GPU Weights slider says otherwise."""
PATCHED_SHARE = 0.25
"""A model on the device may need a quarter of its bytes again while its weights are patched."""
LOAD_MARGIN = 1.3
"""Room asked for per byte loaded: allocators round up, and a block of the right shape is not always free."""


def reserve_bytes(wanted_bytes: int, total_bytes: int) -> int:
    """Bytes of a device kept for activations: what the user wants, or by default 1 GiB and no more than a quarter of the device."""
    return min(wanted_bytes, total_bytes // 4) if wanted_bytes == DEFAULT_INFERENCE_BYTES else wanted_bytes


def partial_load_budget_bytes(free_bytes: int, inference_bytes: int) -> int:
    """Weights that may be resident when a model does not fit whole; the rest streams.

    Leaves the larger of nothing-below-zero margins: 1/1.3 of the room, or the room less 1.25 GiB.
    """
    room_bytes = free_bytes - inference_bytes
    return int(max(0.0, room_bytes / LOAD_MARGIN, room_bytes - 1.25 * GIB))


def load_need_bytes(missing_bytes: int, present_bytes: int) -> int:
    """Room to make before loading models with so many bytes missing from and present on a device."""
    return int(LOAD_MARGIN * (missing_bytes + PATCHED_SHARE * present_bytes))
