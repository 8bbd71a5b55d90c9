"""Bytes a device may use for weights. Pure numbers."""

from __future__ import annotations

GIB = 2**30
DEFAULT_INFERENCE_BYTES = GIB
"""Reserved for activations while a model is in use, unless the user's GPU Weights slider says otherwise."""
PATCHED_SHARE = 0.25
"""Patching the weights of a model on the device may take another quarter of its bytes."""
LOAD_MARGIN = 1.3
"""Room to make per byte loaded: allocators round up, and a block of the right size is not always free."""


def reserve_bytes(wanted_bytes: int, total_bytes: int) -> int:
    """Bytes of a device reserved for activations: the user's value, or by default 1 GiB but no more than a quarter of the device."""
    return min(wanted_bytes, total_bytes // 4) if wanted_bytes == DEFAULT_INFERENCE_BYTES else wanted_bytes


def partial_load_budget_bytes(free_bytes: int, inference_bytes: int) -> int:
    """Bytes of weights that may be resident if a model does not fit whole. The rest streams.

    The larger of 1/1.3 of the room and the room minus 1.25 GiB, but at least 0.
    """
    room_bytes = free_bytes - inference_bytes
    return int(max(0.0, room_bytes / LOAD_MARGIN, room_bytes - 1.25 * GIB))


def load_need_bytes(missing_bytes: int, present_bytes: int) -> int:
    """Room to make before loading models that have `missing_bytes` to load and `present_bytes` already on the device."""
    return int(LOAD_MARGIN * (missing_bytes + PATCHED_SHARE * present_bytes))
