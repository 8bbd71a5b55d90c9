"""Dtypes chosen by hardware facts (CUDA compute capabilities from NVIDIA's list)."""

from __future__ import annotations

import pytest
import torch

from backend.devices.inventory import DeviceFacts
from backend.memory.dtype_policy import MemoryPressure, choose_dtype, choose_vae_dtypes, dtype_from_flag, multiplies_fp8, supports_dtype, uses_bf16

HALF_AND_FULL = (torch.float16, torch.bfloat16, torch.float32)
fp16, bf16, fp32 = HALF_AND_FULL
SPEED = MemoryPressure()
TIGHT_STORAGE = MemoryPressure(parameters=10, free_bytes=1, only_storage=True)


def facts(kind: str, name: str = "", capability: tuple[int, int] | None = None) -> DeviceFacts:
    device = torch.device({"rocm": "cuda", "virtual": "cpu"}.get(kind, kind))
    return DeviceFacts(torch_device=device, kind=kind, name=name, total_bytes=8 * 2**30, compute_capability=capability)


@pytest.mark.parametrize(
    ("device", "computes", "stores_when_tight", "vae"),
    [
        (facts("cuda", "NVIDIA GeForce RTX 4090", (8, 9)), fp16, fp16, bf16),
        (facts("cuda", "NVIDIA H100", (9, 0)), fp16, fp16, bf16),
        (facts("cuda", "NVIDIA GeForce RTX 2080 Ti", (7, 5)), fp16, fp16, fp32),
        (facts("cuda", "Tesla V100", (7, 0)), fp16, fp16, fp32),
        (facts("cuda", "NVIDIA GeForce GTX 1660 Ti", (7, 5)), fp32, bf16, fp32),
        (facts("cuda", "Tesla T4", (7, 5)), fp16, fp16, fp32),
        (facts("cuda", "NVIDIA GeForce GTX 1080 Ti", (6, 1)), fp32, fp16, fp32),
        (facts("cuda", "GeForce GTX 750", (5, 0)), fp32, bf16, fp32),
        (facts("rocm", "AMD Radeon RX 7900 XTX"), fp16, fp16, fp32),
        (facts("xpu", "Intel Arc A770"), fp16, fp16, bf16),
        (facts("mps", "Apple GPU"), fp16, fp16, fp32),
        (facts("cpu"), fp32, fp32, fp32),
        (facts("virtual"), fp32, fp32, fp32),
    ],
    ids=lambda value: f"{value.kind} {value.name}" if isinstance(value, DeviceFacts) else str(value).removeprefix("torch."),
)
def test_types_of_devices(device: DeviceFacts, computes: torch.dtype, stores_when_tight: torch.dtype, vae: torch.dtype) -> None:
    assert choose_dtype(device, HALF_AND_FULL, SPEED) == computes
    assert choose_dtype(device, HALF_AND_FULL, TIGHT_STORAGE) == stores_when_tight
    assert choose_vae_dtypes(device)[0] == vae


def test_only_supported_types_are_chosen() -> None:
    ampere = facts("cuda", "A100", (8, 0))
    assert choose_dtype(ampere, (bf16, fp32), SPEED) == bf16
    assert choose_dtype(ampere, (fp32,), SPEED) == fp32


def test_bf16_before_ampere_is_for_storage_under_pressure_only() -> None:
    turing = facts("cuda", "RTX 2070", (7, 5))
    assert not uses_bf16(turing, SPEED)
    assert not uses_bf16(turing, MemoryPressure(parameters=1, free_bytes=100, only_storage=True))
    assert uses_bf16(turing, TIGHT_STORAGE)


def test_flags_name_types() -> None:
    assert dtype_from_flag("fp8_e4m3fn") is torch.float8_e4m3fn
    assert dtype_from_flag(None) is None
    with pytest.raises(ValueError, match="fp7"):
        dtype_from_flag("fp7")


def test_the_cpu_computes_in_full_precision() -> None:
    assert supports_dtype(facts("cpu"), fp32) and not supports_dtype(facts("cpu"), fp16)
    assert supports_dtype(facts("cuda", "A100", (8, 0)), fp16)


def test_fp8_products_are_nvidias_from_8_9() -> None:
    cards = {(8, 9): True, (9, 0): True, (12, 0): True, (8, 6): False, (7, 5): False}
    assert {capability: multiplies_fp8(facts("cuda", "card", capability)) for capability in cards} == cards
    assert not any(multiplies_fp8(facts(kind)) for kind in ("rocm", "xpu", "mps", "cpu", "virtual"))
