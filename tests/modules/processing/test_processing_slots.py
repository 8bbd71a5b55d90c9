"""Whole jobs on two virtual GPUs, one of which fails during the job. Reference: the same job undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.parallel.running.worker import SlotLost
from modules.application import Application
from tests.support.fleets import virtual_fleet
from tests.support.narrow_application import narrow_application, pixels, run, txt2img

JOB = {"sampler_name": "Euler a", "steps": 4, "batch_size": 2, "do_not_save_grid": True}


PLANS = ("replicas", "layers")


@contextmanager
def _two_slots(data_dir: Path, plan: str) -> Iterator[Application]:
    with virtual_fleet(2), narrow_application(data_dir, "sd15", is_shallow=True) as (application, _):
        application.options.set("multi_gpu_strategy", plan)
        try:
            yield application
        finally:
            _set_no_faults()


def _set_no_faults() -> None:
    for index in (0, 1):
        virtual_gpu.get_device(index).set_faults(None)


@pytest.fixture(scope="module", params=PLANS)
def lasting_app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Application, np.ndarray]]:
    """For tests that leave both slots intact; with the undisturbed picture."""
    with _two_slots(tmp_path_factory.mktemp("slots"), request.param) as application:
        yield application, _picture()


@pytest.fixture
def app(lasting_app: tuple[Application, np.ndarray]) -> Iterator[Application]:
    yield lasting_app[0]
    _set_no_faults()


@pytest.fixture
def expected(lasting_app: tuple[Application, np.ndarray]) -> np.ndarray:
    return lasting_app[1]


@pytest.fixture(params=PLANS)
def app_to_lose(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Application]:
    with _two_slots(tmp_path, request.param) as application:
        yield application


def _picture() -> np.ndarray:
    return np.concatenate([pixels(image) for image in run(txt2img(**JOB)).images])


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("at", [40, 150])
def test_out_of_memory_in_the_middle_of_a_job_changes_no_picture(app: Application, expected: np.ndarray, slot: int, at: int) -> None:
    virtual_gpu.get_device(slot).set_faults(Faults(out_of_memory_at=frozenset({at})))
    assert np.abs(_picture() - expected).max() <= 1
    assert virtual_gpu.get_device(slot).num_refused == 1
    virtual_gpu.get_device(slot).set_faults(None)
    assert np.abs(_picture() - expected).max() <= 1


def _count_operations(slot: int) -> int:
    """Operations of one slot in such a job. The first jobs measure and re-partition the network."""
    device = virtual_gpu.get_device(slot)
    device.set_faults(None)
    _picture()
    return device.num_operations


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_lost_slot_ends_or_shrinks_the_job_and_the_next_uses_the_rest(app_to_lose: Application, share: float) -> None:
    """At any point of the job: its first operation, or during the steps.

    Replicas continue without the slot; a split network, text encoder or VAE on it is lost and loaded again for the next job.
    """
    expected = _picture()
    at = 1 + int(share * _count_operations(1))
    virtual_gpu.get_device(1).set_faults(Faults(lost_at_operation=at))
    try:
        assert np.abs(_picture() - expected).max() <= 1
    except SlotLost as error:
        assert "slot 1" in str(error)
    assert memory_management.lost_devices() == {torch.device("vgpu", 1)}
    assert [slot.index for slot in memory_management.compute_slots()] == [0]
    assert np.abs(_picture() - expected).max() <= 1


def test_a_slow_link_changes_no_picture(app: Application, expected: np.ndarray) -> None:
    virtual_gpu.get_device(1).set_faults(Faults(link_bytes_per_s=2e8, link_latency_s=1e-4))
    assert np.abs(_picture() - expected).max() <= 1


def test_an_interruption_ends_the_job_with_what_was_made_so_far(app: Application) -> None:
    request = txt2img(**{**JOB, "steps": 8})
    set_up = request.setup_conds

    def interrupt() -> None:
        set_up()
        app.state.interrupted = True

    request.setup_conds = interrupt  # type: ignore[method-assign]
    assert len(run(request).images) == JOB["batch_size"]
    app.state.interrupted = False
    assert _picture().any(), "the next job is whole"
