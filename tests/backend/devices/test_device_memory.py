"""Bytes and facts of real devices, with fake drivers; if there is a CUDA device, against its driver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backend.devices import device_memory, inventory
from backend.devices.device_memory import empty_cache, read_device_bytes
from backend.devices.inventory import take_inventory

GIB = 2**30
STATS = {"reserved_bytes.all.current": 6 * GIB, "active_bytes.all.current": 4 * GIB}
HOST = SimpleNamespace(total=32 * GIB, available=20 * GIB)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Facts of real devices are cached per process; clear them, so that each test has its own machine."""
    inventory._describe_real.cache_clear()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host of 32 GiB with 20 free; the returned folder is its cgroup."""
    monkeypatch.setattr(device_memory.psutil, "virtual_memory", lambda: HOST)
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    return tmp_path


def test_cuda_counts_the_allocators_idle_bytes_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: STATS)
    now = read_device_bytes(torch.device("cuda", 0))
    assert (now.total_bytes, now.free_bytes, now.reserved_bytes, now.idle_bytes) == (24 * GIB, 12 * GIB, 6 * GIB, 2 * GIB)


def test_cuda_before_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    assert read_device_bytes(torch.device("cuda", 0)).free_bytes == 23 * GIB


def test_xpu_and_mps(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    monkeypatch.setattr(torch.xpu, "memory_stats", lambda device: STATS)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * GIB, name="Arc"))
    assert read_device_bytes(torch.device("xpu", 0)).free_bytes == 12 * GIB
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * GIB)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 4 * GIB)
    now = read_device_bytes(torch.device("mps", 0))
    assert (now.total_bytes, now.free_bytes, now.idle_bytes) == (32 * GIB, 21 * GIB, GIB)


def test_the_host_without_a_limit(host: Path) -> None:
    now = read_device_bytes(torch.device("cpu"))
    assert (now.total_bytes, now.free_bytes) == (32 * GIB, 20 * GIB)
    (host / "memory.max").write_text("max\n")
    assert read_device_bytes(torch.device("cpu")).total_bytes == 32 * GIB


def test_a_container_has_what_its_limit_leaves(host: Path) -> None:
    (host / "memory.max").write_text(f"{8 * GIB}\n")
    (host / "memory.current").write_text(f"{5 * GIB}\n")
    (host / "memory.stat").write_text(f"anon 1\ninactive_file {2 * GIB}\nslab_reclaimable {GIB}\n")
    now = read_device_bytes(torch.device("cpu"))
    assert (now.total_bytes, now.free_bytes) == (8 * GIB, 6 * GIB)


def test_caches_are_emptied_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []

    class Entered:
        def __init__(self, device: torch.device) -> None:
            emptied.append(str(device))

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: emptied.append("ipc"))
    monkeypatch.setattr(torch.xpu, "empty_cache", lambda: emptied.append("xpu"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
    for name in ("cuda:1", "xpu", "mps", "cpu"):
        empty_cache(torch.device(name))
    assert emptied == ["cuda:1", "cuda", "ipc", "xpu", "mps"]


def test_the_inventory_of_a_cuda_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        SimpleNamespace(name="Large", total_memory=24 * GIB, major=8, minor=9, multi_processor_count=128, clock_rate=2_500_000),
        SimpleNamespace(name="Small", total_memory=8 * GIB, major=7, minor=5, multi_processor_count=32, clock_rate=1_250_000),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[device.index])
    monkeypatch.setattr(torch.version, "hip", None)
    large, small = take_inventory().gpus
    assert (large.kind, large.name, large.total_bytes, large.compute_capability) == ("cuda", "Large", 24 * GIB, (8, 9))
    assert small.throughput / large.throughput == pytest.approx(0.125)
    inventory._describe_real.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert [(card.kind, card.compute_capability) for card in take_inventory().gpus] == [("rocm", None)] * 2


def test_the_inventory_of_other_makers(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(total_memory=16 * GIB, name="Arc"))
    assert [(card.kind, card.name) for card in take_inventory().gpus] == [("xpu", "Arc")]
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [(card.kind, card.total_bytes) for card in take_inventory().gpus] == [("mps", 32 * GIB)]


@pytest.mark.gpu
def test_free_bytes_agree_with_the_driver() -> None:
    device = torch.device("cuda", 0)
    before = read_device_bytes(device).free_bytes
    held = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    assert before - read_device_bytes(device).free_bytes == pytest.approx(held.nbytes, rel=0.1)
    driver_free_bytes, _ = torch.cuda.mem_get_info(device)
    assert read_device_bytes(device).free_bytes >= driver_free_bytes
