"""What a job leaves on a device, and that a full device fails a job and not the program."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from backend import memory_management
from backend.args import BackendConfig
from backend.devices import virtual_gpu
from backend.devices.probing import probe_devices
from modules.application import Application
from tests.support.narrow_application import narrow_application, pixels, run, txt2img

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
