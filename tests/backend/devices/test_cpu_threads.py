from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch

from backend.args import BackendConfig
from backend.devices.cpu_threads import apply_cpu_threads
from backend.devices.probing import probe_devices


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_cpu_slot_computes_with_the_threads_that_the_flag_says() -> None:
    config = BackendConfig(device_ids=("cpu",), cpu_threads_per_slot=3)
    apply_cpu_threads(config, probe_devices(config))
    found: list[int] = []
    worker = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    worker.start()
    worker.join()
    assert (torch.get_num_threads(), found) == (3, [3])


def test_without_the_flag_nothing_changes() -> None:
    before = torch.get_num_threads()
    apply_cpu_threads(BackendConfig(), probe_devices(BackendConfig(device_ids=("cpu",))))
    assert torch.get_num_threads() == before


def test_a_slot_that_is_not_a_cpu_does_not_change_the_threads() -> None:
    before = torch.get_num_threads()
    (slot,) = probe_devices(BackendConfig(device_ids=("cpu",)))
    apply_cpu_threads(BackendConfig(cpu_threads_per_slot=before + 1), [dataclasses.replace(slot, cpu_threads=None)])
    assert torch.get_num_threads() == before
