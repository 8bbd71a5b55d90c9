"""Profiles of whole jobs. Reference: the counts of the virtual GPUs and the transport, and clocks around the pieces of the network."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.telemetry import GpuTelemetry
from backend.memory import current
from backend.nn.program import Program
from backend.nn.unet_program import UNetProgram
from backend.parallel.placing.fleet import Fleet, current_fleet
from backend.profiler import Recording
from modules import processing
from modules.application import Application
from modules.errors import UnknownSamplerError
from modules.jobs import observer
from modules.jobs.observer import JobObserver
from modules.jobs.profile_files import read_profile
from modules.jobs.profile_record import JobRecord, ProfileFile
from tests.support.fleets import cpu_fleet, virtual_fleet
from tests.support.narrow_application import img2img, narrow_application, run, txt2img

PLANS = ("single", "replicas", "layers")


@pytest.fixture(scope="module")
def plain_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    with narrow_application(tmp_path_factory.mktemp("profiles"), is_shallow=True) as (app, _):
        yield app
    current.forget()


@pytest.fixture
def app(plain_app: Application) -> Iterator[Application]:
    """With --profile."""
    before = plain_app.config
    plain_app.config = dataclasses.replace(before, backend=dataclasses.replace(before.backend, profile=True))
    yield plain_app
    plain_app.config = before
    plain_app.options.set("multi_gpu_strategy", "auto")
    plain_app.models.unload()


@pytest.fixture
def gpus(app: Application) -> Iterator[Fleet]:
    app.models.unload()
    with virtual_fleet(2) as fleet:
        yield fleet
        app.models.unload()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[JobRecord]:
    """The records of the jobs, instead of files."""
    written: list[JobRecord] = []
    monkeypatch.setattr(observer, "write_job", lambda folder, job: written.append(job))
    return written


def _request(**fields: Any) -> Any:
    return txt2img(**{"batch_size": 2, "steps": 4, **fields})


def _check(job: JobRecord) -> None:
    """Checks for every record: it matches the file's schema, and each slot's time adds up."""
    assert ProfileFile.model_validate_json(ProfileFile(program="test", jobs=[job]).model_dump_json()).jobs == [job]
    for slot in job.slots:
        assert slot.busy_ms + slot.wait_ms == pytest.approx(job.wall_ms, abs=1e-3)
        assert sum(slot.wait_ms_by_cause.values()) == pytest.approx(slot.wait_ms, abs=1e-3)
        assert sum(wait.end_ms - wait.start_ms for wait in slot.waits) == pytest.approx(slot.wait_ms, abs=1e-3)
    assert all(0 <= span.start_ms <= span.end_ms <= job.wall_ms for span in job.spans)


@pytest.mark.parametrize("plan", PLANS)
def test_a_profile_agrees_with_what_the_virtual_gpus_counted(app: Application, gpus: Fleet, jobs: list[JobRecord], plan: str) -> None:
    app.options.set("multi_gpu_strategy", plan)
    run(_request())  # loads, and places replicas
    before = {slot.index: virtual_gpu.get_device(slot.index).num_operations for slot in gpus.slots}
    sent = dict(gpus.transport.stats.bytes_by_pair())
    run(_request())
    job = jobs[-1]
    _check(job)
    assert (job.outcome, job.error, job.plans[-1].strategy, job.dropped_spans) == ("finished", None, plan, 0)
    assert job.plans[-1].reason
    for slot in job.slots:
        device = virtual_gpu.get_device(slot.slot)
        assert slot.peak.allocated_bytes == device.peak_bytes == job.prediction.measured_bytes[str(slot.slot)]
        assert slot.operations == device.num_operations - before[slot.slot]
    links = {tuple(link.link.split(" > ")): link.bytes for link in job.links}
    assert links == {pair: size - sent.get(pair, 0) for pair, size in gpus.transport.stats.bytes_by_pair().items() if size != sent.get(pair, 0)}
    assert {slot.slot for slot in job.slots if slot.stage_runs} == {slot for replica in job.plans[-1].replicas for slot in replica.stage_slots}
    assert [step.step for step in job.steps] == [0, 1, 2, 3]
    assert {batch.step for batch in job.batches} == {0, 1, 2, 3}
    assert sum(batch.rows for batch in job.batches) == 4 * 4  # in each step two pictures with two prompts each
    kinds = {span.kind for span in job.spans}
    assert {"text encoder", "VAE", "save", "load", "plan"} - kinds <= {"text encoder"}  # prompts may be cached from the last job


@pytest.mark.parametrize("plan", ["replicas", "layers"])
@pytest.mark.parametrize("kind", ["virtual GPUs", "CPU slots"])
def test_every_piece_runs_inside_a_span_of_its_slot(
    app: Application, jobs: list[JobRecord], monkeypatch: pytest.MonkeyPatch, plan: str, kind: str
) -> None:  # fmt: skip
    """`benchmarks/profile_clocks.py` compares span lengths with separate clocks: no test asserts time."""
    pieces: list[tuple[str, int, int]] = []
    recordings: list[Recording] = []
    build_job = observer.build_job

    def timed(run_them: Callable[..., None]) -> Callable[..., None]:
        def run_timed(program: Program, what: Any, state: Any) -> None:
            began_ns = time.perf_counter_ns()
            run_them(program, what, state)
            pieces.append((threading.current_thread().name, began_ns, time.perf_counter_ns()))

        return run_timed

    monkeypatch.setattr(observer, "build_job", lambda recording, facts: recordings.append(recording) or build_job(recording, facts))
    app.models.unload()
    with virtual_fleet(2) if kind == "virtual GPUs" else cpu_fleet(2):
        app.options.set("multi_gpu_strategy", plan)
        run(_request(steps=1))
        monkeypatch.setattr(Program, "run_piece", timed(Program.run_piece))
        monkeypatch.setattr(UNetProgram, "run_segments", timed(UNetProgram.run_segments))
        pieces.clear()
        run(_request(steps=3))
        app.models.unload()
    _check(jobs[-1])
    stages = [span for span in recordings[-1].spans if span.kind in ("network", "stage") and span.name != "time embedding"]
    assert {thread for thread, _, _ in pieces} == {"slot-0", "slot-1"}
    for thread, began_ns, ended_ns in pieces:
        assert any(f"slot-{span.slot}" == thread and span.start_ns <= began_ns and ended_ns <= span.end_ns for span in stages)


def test_one_slot_has_a_profile_too(app: Application, jobs: list[JobRecord]) -> None:
    run(txt2img())
    job = jobs[-1]
    _check(job)
    (slot,) = job.slots
    assert (job.plans[0].strategy, slot.stage_runs, slot.device) == ("single", 3, "cpu")
    assert {"network", "VAE"} <= set(slot.busy_ms_by_kind)


def test_img2img_has_its_encoding_in_it(app: Application, jobs: list[JobRecord]) -> None:
    run(img2img(denoising_strength=0.5))
    assert jobs[-1].request.kind == "img2img"
    assert {span.name for span in jobs[-1].spans if span.kind == "VAE"} == {"encode", "decode"}


def test_a_second_pass_goes_on_counting_steps(app: Application, jobs: list[JobRecord]) -> None:
    run(txt2img(enable_hr=True, hr_scale=2, denoising_strength=0.7, steps=2, hr_second_pass_steps=3))
    assert jobs[-1].request.hires
    assert [step.step for step in jobs[-1].steps] == list(range(len(jobs[-1].steps)))
    assert len(jobs[-1].steps) > 2


@pytest.mark.parametrize("plan", PLANS)
def test_a_job_that_fails_leaves_a_record(
    app: Application, gpus: Fleet, jobs: list[JobRecord], monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:  # fmt: skip
    app.options.set("multi_gpu_strategy", plan)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("modules.processing.latents.decode_latent_batch", fail)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(_request())
    job = jobs[-1]
    _check(job)
    assert (job.outcome, job.error) == ("failed", "RuntimeError: broken on purpose")
    assert (job.plans[-1].strategy, len(job.steps)) == (plan, 4)


def test_a_request_that_cannot_be_done_leaves_a_record(app: Application, jobs: list[JobRecord]) -> None:
    with pytest.raises(UnknownSamplerError):
        run(txt2img(sampler_name="no such sampler"))
    _check(jobs[-1])
    assert (jobs[-1].outcome, jobs[-1].plans, jobs[-1].request.sampler) == ("failed", [], "no such sampler")


@pytest.mark.parametrize("plan", PLANS)
def test_a_job_that_is_interrupted_leaves_a_record(
    app: Application, gpus: Fleet, jobs: list[JobRecord], monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:  # fmt: skip
    app.options.set("multi_gpu_strategy", plan)
    note_step = type(app.job_bar).note_step

    def interrupt(bar: Any) -> None:
        note_step(bar)
        app.state.interrupt()

    monkeypatch.setattr(type(app.job_bar), "note_step", interrupt)
    run(_request(steps=6))
    job = jobs[-1]
    _check(job)
    assert (job.outcome, job.error, job.plans[-1].strategy) == ("interrupted", None, plan)
    assert 1 <= len(job.steps) < 6


def test_without_the_flag_nothing_is_written(plain_app: Application) -> None:
    run(txt2img())
    assert not (plain_app.config.data_dir / "logs").exists()


def test_files_are_whole_and_of_the_last_jobs(app: Application) -> None:
    run(txt2img())
    run(txt2img(steps=2))
    folder = app.config.data_dir / "logs"
    profile = read_profile(folder / "profile.json")
    assert profile is not None
    assert [job.request.steps for job in profile.jobs][-2:] == [3, 2]
    assert json.loads((folder / "trace.json").read_text())["otherData"]["job"] == profile.jobs[-1].id
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {"profile.json", "trace.json", "timeline.png"}


def test_a_full_disk_is_a_warning(app: Application, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(folder: Path, job: JobRecord) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modules.jobs.profile_files.write_profile", full)
    run(txt2img(steps=1))
    assert "could not be written" in caplog.text


def test_a_job_inside_a_job_belongs_to_it(app: Application, jobs: list[JobRecord]) -> None:
    with JobObserver(txt2img(steps=7), app):
        run(txt2img(steps=2))
    assert [job.request.steps for job in jobs] == [7]
    assert len(jobs[0].steps) == 2


def test_the_closing_line_says_time_speed_and_peaks(app: Application, gpus: Fleet, jobs: list[JobRecord], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=processing.log.name):
        run(_request())
    (line,) = [record.getMessage() for record in caplog.records if record.name == processing.log.name]
    assert line.startswith("txt2img: 2 pictures, 64x64, Euler, 4 steps, in ")
    assert " it/s, at most " in line
    for index in (0, 1):
        assert f"{round(virtual_gpu.get_device(index).peak_bytes / 2**20)} MiB on slot {index}" in line


def test_the_driver_is_asked_of_the_slots_of_cards(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    card = GpuTelemetry(
        uuid="GPU-1", name="card", driver="1", total_bytes=100, used_bytes=60, utilization_percent=90, temperature_celsius=70, power_watts=300.0,
        power_limit_watts=None, pcie_generation=None, pcie_lanes=None,
    )  # fmt: skip
    now = [card]
    monkeypatch.setattr(observer, "read_telemetry", lambda: tuple(now))
    monkeypatch.setattr(observer, "find_telemetry", lambda device, cards: cards[0] if device.type == "vgpu" else None)
    with virtual_fleet(2):
        sampler = observer._DriverSampler(memory_management.compute_slots())
        sampler.start()
        now[:] = [dataclasses.replace(card, used_bytes=95)]  # decoding, at the last moment
        samples = sampler.stop()
    assert {(sample.slot, sample.utilization_percent, sample.power_watts) for sample in samples} == {(0, 90, 300.0), (1, 90, 300.0)}
    assert [(sample.slot, sample.used_bytes) for sample in samples[-2:]] == [(0, 95), (1, 95)]


# torch's profiler


@pytest.fixture
def torch_profiled(plain_app: Application) -> Iterator[Application]:
    plain_app.options.profiling_enable = True
    plain_app.options.profiling_with_stack = False
    yield plain_app
    plain_app.options.profiling_enable = False
    plain_app.options.profiling_filename = "trace.json"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchs_profiler_writes_beside_ours(app: Application, torch_profiled: Application, jobs: list[JobRecord]) -> None:
    run(txt2img(steps=1))
    events = json.loads((app.config.data_dir / "logs" / "profiler" / "trace.json").read_text())["traceEvents"]
    assert any("conv" in str(event.get("name")) for event in events)
    assert jobs[-1].outcome == "finished"


def test_torchs_profiler_stays_in_its_folder_and_replaces_only_its_own(torch_profiled: Application, caplog: pytest.LogCaptureFixture) -> None:
    data_dir = torch_profiled.config.data_dir
    (data_dir / "mine.json").write_text("mine")
    for name in ("../outside.json", str(data_dir / "mine.json"), "mine.safetensors"):
        torch_profiled.options.profiling_filename = name
        run(txt2img(steps=1))
    assert not (data_dir.parent / "outside.json").exists() and (data_dir / "mine.json").read_text() == "mine"
    assert caplog.text.count("profiling_filename") == 3
    torch_profiled.options.profiling_filename = "mine.json"
    folder = data_dir / "logs" / "profiler"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.json").write_text("mine")
    run(txt2img(steps=1))
    run(txt2img(steps=1))
    assert (folder / "mine.json").read_text() == "mine" and (folder / "mine-1.json").exists()


def test_torchs_profiler_does_without_what_is_not_there(torch_profiled: Application, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has what the test does without")
    torch_profiled.options.profiling_activities = ["CUDA"]
    run(txt2img(steps=1))
    torch_profiled.options.profiling_activities = ["CPU"]
    assert "cannot profile" in caplog.text
    assert current_fleet() is not None
