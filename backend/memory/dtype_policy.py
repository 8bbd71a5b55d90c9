"""Which dtypes a device stores and computes with. Pure: device facts in, answer out.

The rules by CUDA compute capability are hardware facts: half precision exists from 5.3/6.x, runs at full rate from 7.0, bfloat16 from 8.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backend.devices.inventory import DeviceFacts

DTYPES_BY_FLAG = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_NAMES_WITHOUT_GOOD_FP16 = (
    *("GTX 16", "GTX16", "1630", "1650", "1660", "MX450", "MX550"),
    *("T500", "T550", "T600", "T1000", "T1200", "T2000", "CMP 30HX"),
)
_NAMES_SLOW_FP16 = ("1060", "1070", "1080", "P40", "P4", "P100", "TITAN X")


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPressure:
    """A model's size against free memory: decides whether a slow but small type is worth storing."""

    parameters: int = 0
    free_bytes: int = 0
    only_storage: bool = False
    prefers_speed: bool = True

    @property
    def fp32_does_not_fit(self) -> bool:
        return not self.prefers_speed or self.parameters * 4 > self.free_bytes


def dtype_from_flag(name: str | None) -> torch.dtype | None:
    """The torch dtype for a flag's value. Raises: ValueError for an unknown value."""
    if name is None:
        return None
    if name not in DTYPES_BY_FLAG:
        raise ValueError(f"Number type {name!r} is unknown. Use one of {', '.join(DTYPES_BY_FLAG)}.")
    return DTYPES_BY_FLAG[name]


def uses_fp16(facts: DeviceFacts, pressure: MemoryPressure) -> bool:
    """Whether half precision suits this device and a model of this size."""
    if facts.kind in ("cpu", "virtual"):
        return False
    if facts.kind in ("mps", "xpu", "rocm"):
        return True
    major, minor = facts.compute_capability or (0, 0)
    if major >= 8:
        return True
    if (major, minor) < (5, 3):
        return False
    if any(name in facts.name for name in _NAMES_SLOW_FP16) or major < 7:
        return pressure.only_storage and pressure.fp32_does_not_fit
    return not any(name in facts.name for name in _NAMES_WITHOUT_GOOD_FP16)


def uses_bf16(facts: DeviceFacts, pressure: MemoryPressure) -> bool:
    """Whether bfloat16 suits this device and a model of this size."""
    if facts.kind in ("cpu", "virtual", "mps"):
        return False
    if facts.kind in ("xpu", "rocm"):
        return True
    if (facts.compute_capability or (0, 0))[0] >= 8:
        return True
    return pressure.only_storage and pressure.fp32_does_not_fit


def choose_dtype(facts: DeviceFacts, supported: Sequence[torch.dtype], pressure: MemoryPressure) -> torch.dtype:
    """The first of `supported` (best first) that suits the device; fp32 if no half type does."""
    suits = {torch.float16: uses_fp16, torch.bfloat16: uses_bf16}
    for dtype in supported:
        if dtype in suits and suits[dtype](facts, pressure):
            return dtype
    return torch.float32


def choose_vae_dtypes(facts: DeviceFacts) -> tuple[torch.dtype, ...]:
    """Types for a VAE, best first. Stable Diffusion's VAEs overflow in fp16, so it is never chosen automatically."""
    if facts.kind == "xpu" or (facts.kind == "cuda" and (facts.compute_capability or (0, 0))[0] >= 8):
        return (torch.bfloat16, torch.float32)
    return (torch.float32,)


def multiplies_fp8(facts: DeviceFacts) -> bool:
    """Whether the device has matrix products of fp8 numbers: NVIDIA's from compute capability 8.9."""
    return facts.kind == "cuda" and (facts.compute_capability or (0, 0)) >= (8, 9)


def supports_dtype(facts: DeviceFacts, dtype: torch.dtype) -> bool:
    """Whether the device can compute in `dtype`."""
    if dtype == torch.float32:
        return True
    return facts.kind not in ("cpu", "virtual") and dtype in (torch.float16, torch.bfloat16)
