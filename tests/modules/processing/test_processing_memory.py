"""What a job leaves on a device, and that a full device fails the job but not the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backend import memory_management
from backend.args import BackendConfig
from backend.devices import virtual_device, virtual_gpu
from backend.devices.probing import probe_devices
from backend.devices.virtual_gpu import Faults
from backend.memory import current
from backend.memory.current import current_store
from backend.memory.errors import OutOfMemory
from backend.sampling import registry, samplers_one_step
from modules.application import Application
from modules.jobs.live_preview import PreviewMaker
from modules.samplers import schedules
from modules.samplers.kdiffusion import KDiffusionSampler
from tests.support.narrow_application import KnownPictures, img2img, narrow_application, pixels, run, submit, txt2img

MIB = 2**20


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("memory"), is_shallow=True) as (app, _):
        yield app
    current.forget()


def configure(app: Application, cap_mib: int, **flags: object) -> None:
    app.models.unload()
    config = BackendConfig(virtual_gpus_bytes=(cap_mib * MIB,), **flags)
    memory_management.configure(config, probe_devices(config))


@pytest.mark.parametrize(("flags", "stays"), [({}, True), ({"vram_mode": "low"}, False), ({"always_offload": True}, False)])
def test_weights_stay_after_a_job_or_leave_as_the_flags_say(app: Application, flags: dict[str, object], stays: bool) -> None:
    configure(app, 256, **flags)
    run(txt2img())
    assert bool(memory_management.current_loaded_models) is stays
    assert (virtual_gpu.get_device(0).live_bytes > 10 * MIB) is stays


def test_a_full_device_fails_the_job_and_the_next_one_works(app: Application) -> None:
    configure(app, 256)
    expected = pixels(run(txt2img()).images[0])
    virtual_gpu.get_device(0).cap_bytes = 2 * MIB
    with pytest.raises(RuntimeError, match="out of memory"):
        run(txt2img(width=128, height=128))
    virtual_gpu.get_device(0).cap_bytes = 256 * MIB
    assert np.array_equal(pixels(run(txt2img()).images[0]), expected)


# faults during a job, on one virtual GPU


@pytest.fixture(scope="module")
def known(app: Application) -> KnownPictures:
    """Pictures of an undisturbed device. For requests that were not made before, the test has to prepare one."""
    return KnownPictures()


@pytest.fixture
def undisturbed(app: Application, known: KnownPictures) -> np.ndarray:
    prepare(app)
    return known.txt2img()


def prepare(app: Application) -> None:
    """One virtual GPU without faults and with the model on it. Loads only if an earlier test has not left it so."""
    store = current_store()
    is_there = any(type(entry.real_model).__name__ == "KModel" and entry.device.type == "vgpu" for entry in store.residents)
    if not is_there or store.lost_devices or store.config != BackendConfig(virtual_gpus_bytes=(256 * MIB,)):
        configure(app, 256)
        run(txt2img())
    virtual_gpu.get_device(0).set_faults(None)


@pytest.fixture(scope="module")
def work(app: Application) -> tuple[int, int]:
    """Allocations and operations of a whole job, with the model loaded before."""
    prepare(app)
    device = virtual_gpu.get_device(0)
    device.set_faults(Faults())
    run(txt2img())
    return device.num_allocations, device.num_operations


def assert_next_job_works(app: Application, expected: np.ndarray) -> None:
    virtual_gpu.get_device(0).set_faults(None)
    assert np.array_equal(pixels(run(txt2img()).images[0]), expected)


@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.98])
def test_a_shortage_anywhere_in_a_job_changes_no_picture(app: Application, undisturbed: np.ndarray, work: tuple[int, int], place: float) -> None:
    """In the prompt, in two steps' networks and in the VAE. A step that runs conditions one by one rounds like one row: at most one gray level."""
    prepare(app)
    virtual_gpu.get_device(0).set_faults(Faults(out_of_memory_at=frozenset({int(place * work[0])})))
    assert np.abs(pixels(run(txt2img()).images[0]) - undisturbed).max() <= 1
    assert_next_job_works(app, undisturbed)


def test_a_shortage_in_a_samplers_own_arithmetic_fails_the_job_with_the_table(
    app: Application, undisturbed: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step cannot be made again once its sampler has begun to change the latents. These are its few kilobytes; networks need far more."""
    prepare(app)
    plain = samplers_one_step.derivative

    def short(*args: Any) -> Any:
        virtual_gpu.get_device(0).set_faults(Faults(out_of_memory_at=frozenset({1})))
        return plain(*args)

    with monkeypatch.context() as patched, pytest.raises(OutOfMemory, match=r"vgpu:0 ran out of memory during making the picture"):
        patched.setattr(samplers_one_step, "derivative", short)
        submit(app, txt2img()).wait(timeout_s=300)
    assert_next_job_works(app, undisturbed)


def test_shortages_that_do_not_end_fail_the_job_with_the_table(app: Application, undisturbed: np.ndarray, work: tuple[int, int]) -> None:
    prepare(app)
    num_allocations, _ = work
    virtual_gpu.get_device(0).set_faults(Faults(out_of_memory_at=frozenset(range(num_allocations // 2, 100 * num_allocations))))
    job = submit(app, txt2img())
    with pytest.raises(OutOfMemory, match=r"vgpu:0 ran out of memory during .*\n.*vgpu:0 \(virtual GPU\): total 256 MiB"):
        job.wait(timeout_s=300)
    assert app.state.job == ""
    assert_next_job_works(app, undisturbed)


# faults in the small, easily forgotten work between networks


@contextmanager
def shortage_in(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Iterator[list[int]]:
    """Make all allocations in a function's first call fail; returns the number of allocations per call."""
    plain, made, device = getattr(owner, name), list[int](), virtual_gpu.get_device(0)

    def short(*args: Any, **named: Any) -> Any:
        device.set_faults(Faults(out_of_memory_at=frozenset(range(1, 1000)) if not made else frozenset()))
        made.append(0)
        try:
            return plain(*args, **named)
        finally:
            made[-1] = device.num_allocations
            device.set_faults(None)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, short)
        yield made


@pytest.mark.parametrize("make, place", [(txt2img, "_start_from_noise"), (img2img, "_start_from_latents")])
def test_the_starting_noise_is_made_again_where_it_found_no_room(
    app: Application, known: KnownPictures, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], place: str
) -> None:
    prepare(app)
    expected = known.picture(make, {})
    with shortage_in(monkeypatch, KDiffusionSampler, place) as made:
        assert np.array_equal(pixels(run(make()).images[0]), expected)
    assert len(made) == 2 and min(made) > 0


def test_latents_are_moved_again_where_they_found_no_room(app: Application, known: KnownPictures, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(app)
    expected = known.img2img()
    plain, device, made = KDiffusionSampler._with_recovery, virtual_gpu.get_device(0), list[int]()

    def with_recovery(self: KDiffusionSampler, move: Callable[[], torch.Tensor], what: str) -> torch.Tensor:
        def short() -> torch.Tensor:
            device.set_faults(Faults(out_of_memory_at=range(1, 1000 if not made else 1)))
            made.append(0)
            try:
                return move().clone()  # they may lie there already, where a move takes no room
            finally:
                made[-1] = device.num_allocations
                device.set_faults(None)

        return plain(self, short if what == "moving the latents" else move, what)

    with monkeypatch.context() as patched:
        patched.setattr(KDiffusionSampler, "_with_recovery", with_recovery)
        assert np.array_equal(pixels(run(img2img()).images[0]), expected)
    assert len(made) == 2 and min(made) > 0


def test_a_preview_without_room_costs_only_the_preview(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the methods only this one takes room on the device."""
    prepare(app)
    every_step = {"live_previews_enable": True, "show_progress_type": "Full", "show_progress_every_n_steps": 1, "live_preview_refresh_period": 0}
    for name, value in every_step.items():
        monkeypatch.setitem(app.options.data, name, value)
    expected = pixels(submit(app, txt2img(steps=4)).wait(timeout_s=300).images[0])
    with shortage_in(monkeypatch, PreviewMaker, "_make") as made:
        assert np.array_equal(pixels(submit(app, txt2img(steps=4)).wait(timeout_s=300).images[0]), expected)
    assert len(made) >= 2 and min(made) > 0, "the first has no room, the next ones are made"
    assert app.state.current_image is not None


def _levels_of_the_network(n: int, sigma_min: float, sigma_max: float, inner_model: Any, device: str) -> torch.Tensor:
    """As an extension creates them: with the network's table, on the same device."""
    del device
    table_T = inner_model.predictor.sigmas.to(inner_model.diffusion_model.conv_in.weight.device) * 1.0
    return torch.cat([torch.linspace(min(float(table_T[-1]), sigma_max), sigma_min, n), torch.zeros(1)])


def test_the_noise_schedule_is_made_again_where_it_found_no_room(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(app)
    scheduler = schedules.Scheduler("guests", "Guest's", _levels_of_the_network, need_inner_model=True)
    monkeypatch.setattr(schedules, "schedulers", [*schedules.schedulers, scheduler])
    expected = pixels(run(txt2img(scheduler="Guest's")).images[0])
    with shortage_in(monkeypatch, scheduler, "function") as made:
        assert np.array_equal(pixels(run(txt2img(scheduler="Guest's")).images[0]), expected)
    assert len(made) == 2 and min(made) > 0


@pytest.mark.parametrize("name", ["Normal", "SGM Uniform", "Karras", "Beta"])
def test_a_schedule_of_ours_is_made_again_where_it_found_no_room(app: Application, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    prepare(app)
    expected = pixels(run(txt2img(scheduler=name)).images[0])
    with shortage_in(monkeypatch, registry, "compute_sigmas"):
        assert np.array_equal(pixels(run(txt2img(scheduler=name)).images[0]), expected)


def _takes_a_tensor() -> None:
    torch.empty(2**20, device="vgpu:0")


def test_a_shortage_of_any_job_tells_of_all_devices(app: Application) -> None:
    prepare(app)
    virtual_gpu.get_device(0).set_faults(Faults(out_of_memory_at=frozenset({1})))
    with pytest.raises(OutOfMemory, match=r"vgpu:0 ran out of memory during the job extras.*\n.*vgpu:0 \(virtual GPU\): .* used by .*KModel"):
        app.jobs.submit(None, "extras", _takes_a_tensor).wait(timeout_s=60)
    virtual_gpu.get_device(0).set_faults(None)


def test_a_shortage_between_the_networks_tells_of_all_devices(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(app)
    monkeypatch.setattr(KDiffusionSampler, "_set_brownian_range", lambda *args: _takes_a_tensor())
    explained = pytest.raises(OutOfMemory, match=r"ran out of memory during making the picture.*\n.*vgpu:0 \(virtual GPU\)")
    with shortage_in(monkeypatch, KDiffusionSampler, "_set_brownian_range"), explained:
        run(txt2img())


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_device_lost_in_a_job_is_a_clear_failure_and_works_when_it_is_back(
    app: Application, undisturbed: np.ndarray, work: tuple[int, int], place: float
) -> None:
    prepare(app)
    virtual_gpu.get_device(0).set_faults(Faults(lost_at_operation=int(place * work[1])))
    for _ in range(2):  # the next job also fails clearly, without hanging or a wrong picture
        with pytest.raises((torch.AcceleratorError, RuntimeError), match="lost"):
            submit(app, txt2img()).wait(timeout_s=300)
        assert app.state.job == ""
    virtual_gpu.get_device(0).set_faults(None)
    configure(app, 256)  # the device's contents are lost; a user would restart the program here
    assert_next_job_works(app, undisturbed)


def test_a_slow_link_slows_the_job_and_changes_no_pixel(app: Application, undisturbed: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed weights are copied repeatedly. The waits are counted, not actually waited."""
    waited_s: list[float] = []
    monkeypatch.setattr(virtual_device, "time", SimpleNamespace(sleep=waited_s.append))
    configure(app, 256, vram_mode="no")
    virtual_gpu.get_device(0).set_faults(Faults(link_bytes_per_s=1e9, link_latency_s=0.001))
    assert np.array_equal(pixels(run(txt2img()).images[0]), undisturbed)
    moved_bytes = sum(virtual_gpu.copied_bytes().values())
    assert sum(waited_s) == pytest.approx(0.001 * len(waited_s) + moved_bytes / 1e9)
    assert moved_bytes > 3 * sum(parameter.nbytes for parameter in app.models.ensure_loaded().forge_objects.unet.model.parameters())
    assert_next_job_works(app, undisturbed)
