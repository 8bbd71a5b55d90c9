"""The initial state of a device, and how much of a model is loaded partially."""

from __future__ import annotations

import pytest

from backend.memory.budget import GIB, load_need_bytes, partial_load_budget_bytes
from backend.memory.vram_state import CPUState, VRAMState, choose_cpu_state, choose_vram_state


def test_values_are_those_that_extensions_compare_with() -> None:
    assert [state.value for state in VRAMState] == [0, 1, 2, 3, 4, 5]
    assert [(state.name, state.value) for state in CPUState] == [("GPU", 0), ("CPU", 1), ("MPS", 2)]


@pytest.mark.parametrize(
    ("kind", "mode", "total_gib", "expected"),
    [
        ("cuda", "auto", 24, VRAMState.NORMAL_VRAM),
        ("cuda", "auto", 4, VRAMState.LOW_VRAM),
        ("virtual", "auto", 4, VRAMState.NORMAL_VRAM),
        ("cuda", "normal", 4, VRAMState.NORMAL_VRAM),
        ("cuda", "low", 24, VRAMState.LOW_VRAM),
        ("cuda", "no", 24, VRAMState.NO_VRAM),
        ("cuda", "high", 24, VRAMState.HIGH_VRAM),
        ("cuda", "always_gpu", 24, VRAMState.HIGH_VRAM),
        ("rocm", "auto", 16, VRAMState.NORMAL_VRAM),
        ("cpu", "high", 64, VRAMState.DISABLED),
        ("mps", "auto", 16, VRAMState.SHARED),
    ],
)
def test_state_of_flags_and_card(kind: str, mode: str, total_gib: int, expected: VRAMState) -> None:
    assert choose_vram_state(kind, mode, total_gib * GIB) is expected


def test_cpu_state_of_the_primary() -> None:
    assert [choose_cpu_state(kind) for kind in ("cuda", "virtual", "cpu", "mps")] == [CPUState.GPU, CPUState.GPU, CPUState.CPU, CPUState.MPS]


def test_partial_load_budget_follows_its_formula() -> None:
    # a = free - inference; max(a / 1.3, a - 1.25 GiB), never below zero
    assert partial_load_budget_bytes(4 * GIB, GIB) == int(3 * GIB / 1.3)
    assert partial_load_budget_bytes(12 * GIB, GIB) == int(11 * GIB - 1.25 * GIB)
    assert partial_load_budget_bytes(GIB, 2 * GIB) == 0


def test_load_need_has_its_margin() -> None:
    assert load_need_bytes(1000, 400) == int(1.3 * (1000 + 100))
