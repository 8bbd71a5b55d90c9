"""What a job leaves on a device, and that a full device fails a job and not the program."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backend import memory_management
from backend.args import BackendConfig
from backend.devices import virtual_device, virtual_gpu
from backend.devices.probing import probe_devices
from backend.devices.virtual_gpu import Faults
from backend.memory.errors import OutOfMemory
from modules.application import Application
from tests.support.narrow_application import narrow_application, pixels, run, submit, txt2img

MIB = 2**20


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("memory")) as (app, _):
        yield app
    memory_management._configured.store = None


def configure(app: Application, cap_mib: int, **flags: object) -> None:
    app.models.unload()
    config = BackendConfig(virtual_gpus_bytes=(cap_mib * MIB,), **flags)
    memory_management.configure(config, probe_devices(config))


@pytest.mark.parametrize(("flags", "stays"), [({}, True), ({"vram_mode": "low"}, False), ({"always_offload": True}, False)])
def test_weights_stay_after_a_job_or_leave_as_the_flags_say(app: Application, flags: dict[str, object], stays: bool) -> None:
    configure(app, 256, **flags)
    run(txt2img())
    assert bool(memory_management.current_loaded_models) is stays
    assert (virtual_gpu.get_device(0).live_bytes > 30 * MIB) is stays


def test_a_full_device_fails_the_job_and_the_next_one_works(app: Application) -> None:
    configure(app, 256)
    expected = pixels(run(txt2img()).images[0])
    virtual_gpu.get_device(0).cap_bytes = 2 * MIB
    with pytest.raises(RuntimeError, match="out of memory"):
        run(txt2img(width=128, height=128))
    virtual_gpu.get_device(0).cap_bytes = 256 * MIB
    assert np.array_equal(pixels(run(txt2img()).images[0]), expected)


# faults in the middle of a job, on one virtual GPU


@pytest.fixture(scope="module")
def undisturbed(app: Application) -> np.ndarray:
    configure(app, 256)
    return pixels(run(txt2img()).images[0])


def count_work(app: Application) -> tuple[int, int]:
    """Allocations and operations of a whole job, with the model loaded before."""
    configure(app, 256)
    run(txt2img())
    device = virtual_gpu.get_device(0)
    device.set_faults(Faults())
    run(txt2img())
    return device.num_allocations, device.num_operations


def assert_next_job_works(app: Application, expected: np.ndarray) -> None:
    virtual_gpu.get_device(0).set_faults(None)
    assert np.array_equal(pixels(run(txt2img()).images[0]), expected)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.98])
def test_a_shortage_anywhere_in_a_job_changes_no_picture(app: Application, undisturbed: np.ndarray, place: float) -> None:
    """In the prompt, in two steps and in the VAE. A step that runs its conditions one by one rounds as a batch of one does: a grey level at most."""
    num_allocations, _ = count_work(app)
    virtual_gpu.get_device(0).set_faults(Faults(out_of_memory_at=frozenset({int(place * num_allocations)})))
    assert np.abs(pixels(run(txt2img()).images[0]) - undisturbed).max() <= 1
    assert_next_job_works(app, undisturbed)


def test_shortages_that_do_not_end_fail_the_job_with_the_table(app: Application, undisturbed: np.ndarray) -> None:
    num_allocations, _ = count_work(app)
    virtual_gpu.get_device(0).set_faults(Faults(out_of_memory_at=frozenset(range(num_allocations // 2, 100 * num_allocations))))
    job = submit(app, txt2img())
    with pytest.raises(OutOfMemory, match=r"vgpu:0 ran out of memory at .*\n.*vgpu:0 \(virtual GPU\): total 256 MiB"):
        job.wait(timeout_s=300)
    assert app.state.job == ""
    assert_next_job_works(app, undisturbed)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_device_lost_in_a_job_is_a_clear_failure_and_works_when_it_is_back(app: Application, undisturbed: np.ndarray, place: float) -> None:
    _, num_operations = count_work(app)
    virtual_gpu.get_device(0).set_faults(Faults(lost_at_operation=int(place * num_operations)))
    for _ in range(2):  # the next job fails as clearly, it neither hangs nor gives a wrong picture
        with pytest.raises((torch.AcceleratorError, RuntimeError), match="lost"):
            submit(app, txt2img()).wait(timeout_s=300)
        assert app.state.job == ""
    virtual_gpu.get_device(0).set_faults(None)
    configure(app, 256)  # what was on the device is gone; a user restarts the program here
    assert_next_job_works(app, undisturbed)


def test_a_slow_link_slows_the_job_and_changes_no_pixel(app: Application, undisturbed: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed weights cross again and again. The waits are counted, not waited."""
    waited_s: list[float] = []
    monkeypatch.setattr(virtual_device, "time", SimpleNamespace(sleep=waited_s.append))
    configure(app, 256, vram_mode="no")
    virtual_gpu.get_device(0).set_faults(Faults(link_bytes_per_s=1e9, link_latency_s=0.001))
    assert np.array_equal(pixels(run(txt2img()).images[0]), undisturbed)
    moved_bytes = sum(virtual_gpu.copied_bytes().values())
    assert sum(waited_s) == pytest.approx(0.001 * len(waited_s) + moved_bytes / 1e9)
    assert moved_bytes > 3 * 30 * MIB
    assert_next_job_works(app, undisturbed)
