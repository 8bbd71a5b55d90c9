"""Memory functions that older extensions call. backend/memory plans memory; these delegate to it."""

from __future__ import annotations

from typing import Any


def send_everything_to_cpu() -> None:
    """Move all models off the devices."""
    from backend import memory_management  # imports torch

    memory_management.unload_all_models()


def is_enabled(sd_model: Any) -> bool:
    """Always false: no extension moves the parts of a model one by one."""
    return False


def is_needed(sd_model: Any) -> bool:
    return False


def setup_for_low_vram(sd_model: Any, use_medvram: bool) -> None:
    """Kept for extensions that call it; memory is planned for every model anyway."""


def apply(sd_model: Any) -> None:
    """Kept for extensions that call it."""
