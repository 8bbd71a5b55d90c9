"""The states of a device's memory, and the rule that chooses one. Pure."""

from __future__ import annotations

from enum import Enum, IntEnum


class VRAMState(IntEnum):
    """How a device is used for weights. The values are those that users and extensions know."""

    DISABLED = 0
    """No GPU: the host computes, and weights stay where they are."""
    NO_VRAM = 1
    """Weights always stay on the host and stream through the device."""
    LOW_VRAM = 2
    """Weights leave the device after every job; large models stream."""
    NORMAL_VRAM = 3
    """Weights stay until something else needs the room; models that are too large stream in part."""
    HIGH_VRAM = 4
    """Weights are loaded whole and stay."""
    SHARED = 5
    """Host and device are the same memory: moving gains nothing."""


class CPUState(Enum):
    """Which kind of processor computes."""

    GPU = 0
    CPU = 1
    MPS = 2


_BY_FLAG = {
    "always_gpu": VRAMState.HIGH_VRAM,
    "high": VRAMState.HIGH_VRAM,
    "normal": VRAMState.NORMAL_VRAM,
    "low": VRAMState.LOW_VRAM,
    "no": VRAMState.NO_VRAM,
}
_SMALL_CARD_BYTES = 5 * 2**30
"""A card of at most this size has no room for an SDXL UNet in half precision (5.1 GB), so weights leave it after every job."""


def choose_vram_state(kind: str, vram_mode: str, total_bytes: int) -> VRAMState:
    """State for a device of `kind` ("cpu", "cuda", "rocm", "xpu", "mps", "virtual") under the flag `vram_mode`.

    Without a flag, a real card that is too small for an SDXL UNet starts as LOW, others as NORMAL.
    """
    if kind == "cpu":
        return VRAMState.DISABLED
    if kind == "mps":
        return VRAMState.SHARED
    if vram_mode in _BY_FLAG:
        return _BY_FLAG[vram_mode]
    return VRAMState.LOW_VRAM if total_bytes <= _SMALL_CARD_BYTES and kind != "virtual" else VRAMState.NORMAL_VRAM


def choose_cpu_state(kind: str) -> CPUState:
    """Processor kind of the primary device."""
    return {"cpu": CPUState.CPU, "mps": CPUState.MPS}.get(kind, CPUState.GPU)
