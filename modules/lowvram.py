"""Questions about memory that extensions of old programs ask. Memory is planned in backend/memory; here they get to its entries."""

from __future__ import annotations

from typing import Any


def send_everything_to_cpu() -> None:
    """Take all models off the devices."""
    from backend import memory_management  # imports torch

    memory_management.unload_all_models()


def is_enabled(sd_model: Any) -> bool:
    """Whether the parts of a model are moved one by one by an extension; they never are."""
    return False


def is_needed(sd_model: Any) -> bool:
    return False


def setup_for_low_vram(sd_model: Any, use_medvram: bool) -> None:
    """Kept for extensions that call it; memory is planned for every model."""


def apply(sd_model: Any) -> None:
    """Kept for extensions that call it."""
