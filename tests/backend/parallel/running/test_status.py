"""The status of slots, plan and links, as shown to users."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backend import memory_management
from backend.args import BackendConfig
from backend.devices.device_memory import DeviceBytes
from backend.devices.links import Verdict
from backend.devices.probing import probe_devices
from backend.devices.slot import Slot
from backend.devices.telemetry import GpuTelemetry
from backend.memory.vram_state import VRAMState
from backend.parallel.planning.plan import Piece, Plan, ReplicaPlan
from backend.parallel.planning.slot_facts import Link
from backend.parallel.running import status

MIB = 2**20


@pytest.fixture(autouse=True)
def _nothing_is_told() -> Iterator[None]:
    status.set_current_plan(None)
    status.set_speeds({})
    status.set_links((), {})
    yield
    status.set_current_plan(None)
    status.set_speeds({})
    status.set_links((), {})


@pytest.fixture
def two_virtual() -> Iterator[None]:
    config = BackendConfig(virtual_gpus_bytes=(64 * MIB, 32 * MIB), multi_gpu=True)
    memory_management.configure(config, probe_devices(config))
    yield
    memory_management.configure(BackendConfig(), probe_devices(BackendConfig()))


class Patcher:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.load_device, self.offload_device, self.current_device = model, device, torch.device("cpu"), torch.device("cpu")


@pytest.mark.usefixtures("two_virtual")
def test_slots_report_their_models() -> None:
    model = nn.Linear(1024, 1024)
    patcher = Patcher(model, torch.device("vgpu:1"))
    memory_management.load_models_gpu([patcher])
    first, second = status.describe_slots()
    weights_bytes = 4 * (1024 * 1024 + 1024)
    assert (first.index, first.name, first.torch_device, first.vram_state) == (0, "virtual GPU", "vgpu:0", "NORMAL_VRAM")
    assert (first.total_bytes, first.free_bytes, first.resident_bytes, first.holders) == (64 * MIB, 64 * MIB, 0, ())
    assert (second.resident_bytes, second.holders) == (weights_bytes, (("Linear", weights_bytes),))
    assert second.free_bytes == 32 * MIB - weights_bytes
    assert second.peak_bytes is not None
    assert second.peak_bytes >= weights_bytes
    assert (second.utilization, second.temperature, second.power) == (None, None, None)


@pytest.mark.usefixtures("two_virtual")
def test_speeds_are_relative_to_the_first_slot() -> None:
    assert [slot.speed for slot in status.describe_slots()] == [1.0, 1.0]
    status.set_speeds({0: 40.0, 1: 10.0})
    assert [slot.speed for slot in status.describe_slots()] == [1.0, 0.25]
    status.set_speeds({1: 10.0})
    assert [slot.speed for slot in status.describe_slots()] == [1.0, 1.0]


@pytest.mark.usefixtures("two_virtual")
def test_a_lost_slot_is_not_queried(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> DeviceBytes:
        assert device == torch.device("vgpu:0")
        return DeviceBytes(total_bytes=1, free_bytes=1, reserved_bytes=0, idle_bytes=0)

    memory_management.lose_device("vgpu:1")
    rows = memory_management.describe_devices()
    monkeypatch.setattr(memory_management, "describe_devices", lambda: rows)
    monkeypatch.setattr(status, "read_device_bytes", refuse)
    lost = status.describe_slots()[1]
    assert (lost.vram_state, lost.total_bytes, lost.free_bytes, lost.peak_bytes) == ("LOST", 32 * MIB, 0, None)


def test_an_unused_card_is_queried_through_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    card = GpuTelemetry(
        uuid="GPU-1", name="Card", driver="1", total_bytes=24 * MIB, used_bytes=6 * MIB, utilization_percent=30, temperature_celsius=60,
        power_watts=200.5, power_limit_watts=450.0, pcie_generation=4, pcie_lanes=16,
    )  # fmt: skip
    monkeypatch.setattr(memory_management, "lost_devices", frozenset)
    store = SimpleNamespace(all_slots=(Slot(0, torch.device("cuda:0"), "Card", 24 * MIB),))
    monkeypatch.setattr(memory_management, "current_store", lambda: store)
    monkeypatch.setattr(memory_management, "describe_devices", lambda: ())
    monkeypatch.setattr(memory_management, "vram_state_of", lambda device: VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(status, "read_telemetry", lambda: (card,))
    monkeypatch.setattr(status, "find_telemetry", lambda device, cards: cards[0])
    (slot,) = status.describe_slots()
    assert (slot.total_bytes, slot.free_bytes, slot.peak_bytes) == (24 * MIB, 18 * MIB, 0)
    assert (slot.utilization, slot.temperature, slot.power) == (30, 60, 200.5)


def test_the_current_plan_is_the_one_that_was_set() -> None:
    assert status.current_plan() is None
    pieces = tuple(Piece(index) for index in range(3))
    plan = Plan(
        strategy="layers", replicas=(ReplicaPlan(pieces=pieces, slots=(0, 1, 0)),), reason="two slots hold it", predicted_ms=20.0,
        predicted_bytes={0: 5, 1: 6},
    )  # fmt: skip
    status.set_current_plan(plan, rows=(2,), measured_ms=21.5)
    told = status.current_plan()
    assert told is not None
    assert (told.strategy, told.reason, told.replicas, told.stages, told.rows) == ("layers", "two slots hold it", 1, ((0, 1, 0),), (2,))
    assert (told.predicted_ms, told.measured_ms, dict(told.predicted_bytes)) == (20.0, 21.5, {0: 5, 1: 6})


def test_links_carry_their_routes() -> None:
    links = [Link(source=0, target=1, bytes_per_ms=2e7, latency_ms=0.02), Link(source=1, target=0)]
    status.set_links(links, {(0, 1): Verdict(route="peer", reason="checked")})
    one, other = status.current_links()
    assert (one.source, one.target, one.route, one.reason, one.bytes_per_ms) == (0, 1, "peer", "checked", 2e7)
    assert (other.route, other.reason) == ("unknown", "not tested")
