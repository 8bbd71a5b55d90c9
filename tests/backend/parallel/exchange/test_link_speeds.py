"""Speeds of links for the planner: from verdicts, from faults of virtual GPUs, or estimated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backend.devices import virtual_gpu
from backend.devices.links import Verdict
from backend.devices.slot import Slot
from backend.parallel.exchange import link_speeds
from backend.parallel.exchange.link_speeds import measure_links
from backend.parallel.planning.slot_facts import HOST_BYTES_PER_MS, HOST_LATENCY_MS


@pytest.fixture(autouse=True)
def _memory_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    virtual_gpu.install((2**20, 2**20))
    monkeypatch.setattr(link_speeds, "host_bytes_per_ms", lambda: 5e6)
    yield
    virtual_gpu.get_device(0).set_faults(None)


def slots_on(*devices: str) -> list[Slot]:
    return [Slot(index, torch.device(device), device, 1) for index, device in enumerate(devices)]


def speeds(*devices: str, verdicts: dict[tuple[int, int], Verdict] | None = None) -> dict[tuple[int, int], tuple[float, float]]:
    links = measure_links(slots_on(*devices), verdicts)
    return {(link.source, link.target): (link.bytes_per_ms, link.latency_ms) for link in links}


def test_every_ordered_pair_has_a_link() -> None:
    assert sorted(speeds("cpu", "cpu", "vgpu:0")) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert speeds("cpu") == {}


def test_slots_of_one_device_hand_over_without_a_copy() -> None:
    assert speeds("cpu", "cpu")[0, 1] == (5e6, 0.0)


def test_virtual_gpus_are_as_fast_as_memory_and_as_slow_as_their_link() -> None:
    assert speeds("vgpu:0", "vgpu:1")[0, 1][0] == 5e6
    virtual_gpu.get_device(0).set_faults(virtual_gpu.Faults(link_bytes_per_s=1e6, link_latency_s=0.01))
    bytes_per_ms, latency_ms = speeds("vgpu:1", "vgpu:0")[0, 1]
    assert bytes_per_ms == 1000
    assert latency_ms > 10
    assert virtual_gpu.get_device(0).num_allocations == virtual_gpu.get_device(1).num_allocations == 0


def test_verdicts_know_better() -> None:
    verdicts = {(0, 1): Verdict(route="peer", reason="checked", bytes_per_ms=2e7, latency_ms=0.02), (1, 0): Verdict(route="staged", reason="hang")}
    assert speeds("cuda:0", "cuda:1", verdicts=verdicts) == {(0, 1): (2e7, 0.02), (1, 0): (HOST_BYTES_PER_MS, HOST_LATENCY_MS)}


@pytest.mark.gpu
@pytest.mark.parametrize("to_device", [False, True])
def test_a_real_card_is_timed(to_device: bool) -> None:
    bytes_per_ms, latency_ms = link_speeds.time_host_copy(torch.device("cuda:0"), to_device=to_device)
    assert bytes_per_ms > 1e5
    assert 0 < latency_ms < 10
