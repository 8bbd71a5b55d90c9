"""Observes a job to show what the devices do: progress bar, --profile, torch's profiler, peak memory.

Must not know how pictures are made. A profile that cannot be written gives a warning and never fails the job.
"""

from __future__ import annotations

import datetime
import gzip
import logging
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from backend import memory_management, profiler
from backend.devices import virtual_gpu
from backend.devices.peak_memory import read_peak, reset_peak
from backend.devices.slot import Slot, format_bytes
from backend.devices.telemetry import find_telemetry, read_telemetry
from modules.errors import OptionError
from modules.jobs.profile_record import JobFacts, JobRecord, Outcome, PeakRecord, RequestRecord, SampleRecord, SlotFigures, build_job
from modules.pictures.writing import numbered_names, write_whole
from modules.settings.folder_policy import check_log_name

if TYPE_CHECKING:
    from modules.jobs.context import JobContext

log = logging.getLogger(__name__)

LOG_FOLDER = "logs"
PROFILER_FOLDER = "profiler"
_TRACE_BEGINS_WITH = b'"schemaVersion"'
SAMPLE_EVERY_S = 0.25
_running: list[JobObserver] = []


class JobObserver:
    """Wraps a job, on its thread. A nested job belongs to the outer one."""

    def __init__(self, p: Any, app: JobContext) -> None:
        self.p, self.app = p, app
        self._slots: tuple[Slot, ...] = ()
        self._sampler: _DriverSampler | None = None
        self._torch_profiler: Any = None
        self._operations_before: dict[int, int] = {}
        self._began = datetime.datetime.now().astimezone()

    def __enter__(self) -> None:
        _running.append(self)
        if len(_running) > 1:
            return
        self._slots = memory_management.compute_slots()
        is_on = self.app.config.backend.profile
        for slot in self._slots:
            reset_peak(slot.torch_device)
            self._operations_before[slot.index] = _num_operations(slot)
        self.app.job_bar.begin(is_hidden=self.app.config.disable_console_progressbars)
        self._torch_profiler = _start_torch_profiler(self.app.options)
        profiler.begin(self._slots, is_on=is_on)
        if is_on and any(slot.torch_device.type == "cuda" for slot in self._slots):
            self._sampler = _DriverSampler(self._slots)
            self._sampler.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _running.remove(self)
        if _running:
            return
        recording = profiler.end()
        samples = self._sampler.stop() if self._sampler is not None else []
        self.app.job_bar.end()
        _finish_torch_profiler(self._torch_profiler, self.app)
        if recording is None:
            return
        job = build_job(recording, self._facts(error, samples))
        self.app.last_profile = job
        write_job(self.app.config.data_dir / LOG_FOLDER, job)

    def _facts(self, error: BaseException | None, samples: list[SampleRecord]) -> JobFacts:
        outcome: Outcome = "failed" if error is not None else "interrupted" if self.app.state.interrupted else "finished"
        return JobFacts(
            id=self._began.strftime("%Y%m%d-%H%M%S-%f"),
            started_at=self._began.isoformat(),
            outcome=outcome,
            error=None if error is None else f"{type(error).__name__}: {error}",
            request=_describe_request(self.p),
            slots=[self._figures(slot, samples) for slot in self._slots],
            samples=samples,
        )

    def _figures(self, slot: Slot, samples: list[SampleRecord]) -> SlotFigures:
        used = [sample.used_bytes for sample in samples if sample.slot == slot.index]
        peak = None if slot.torch_device in memory_management.lost_devices() else read_peak(slot.torch_device)
        return SlotFigures(
            slot=slot.index,
            name=slot.name,
            device=str(slot.torch_device),
            peak=PeakRecord(
                allocated_bytes=peak.allocated_bytes if peak else None,
                reserved_bytes=peak.reserved_bytes if peak else None,
                driver_bytes=max(used) if used else None,
            ),
            operations=_num_operations(slot) - self._operations_before[slot.index] if _is_virtual(slot) else None,
        )


def write_job(folder: Path, job: JobRecord) -> None:
    """Write profile.json, trace.json and timeline.png."""
    from modules.jobs.profile_files import PROFILE, TIMELINE, TRACE, write_profile

    try:
        write_profile(folder, job)
    except (OSError, ImportError) as error:
        log.warning("The profile of the job could not be written to %s (%s). Is the disk full, or the package matplotlib missing?", folder, error)
    else:
        log.info("Profile: %s, %s, %s in %s.", PROFILE, TRACE, TIMELINE, folder)


def describe_cost(seconds: float) -> str:
    """What a job cost: "3.1 s, 6.5 it/s, at most 5.1 GiB on slot 0 and 4.9 GiB on slot 1"."""
    meter = profiler.meter()
    parts = [f"{seconds:.1f} s"]
    if meter.steps_per_s is not None:
        parts.append(f"{meter.steps_per_s:.2f} it/s")
    lost = memory_management.lost_devices()
    peaks = {slot.index: read_peak(slot.torch_device).allocated_bytes for slot in meter.slots if slot.torch_device not in lost}
    told = [f"{format_bytes(peak_bytes)} on slot {index}" for index, peak_bytes in peaks.items() if peak_bytes is not None]
    if told:
        parts.append(f"at most {' and '.join([', '.join(told[:-1]), told[-1]] if len(told) > 1 else told)}")
    return ", ".join(parts)


def _describe_request(p: Any) -> RequestRecord:
    """The request as far as it is filled in; if it failed early, its fields may contain anything."""
    return RequestRecord(
        kind="img2img" if hasattr(p, "init_images") else "txt2img",
        model=str(getattr(p, "sd_model_name", None) or ""),
        width_px=int(_number(p, "width")),
        height_px=int(_number(p, "height")),
        steps=int(_number(p, "steps")),
        sampler=str(p.sampler_name or ""),
        scheduler=str(getattr(p, "scheduler", None) or ""),
        cfg_scale=_number(p, "cfg_scale"),
        batch_size=int(_number(p, "batch_size")),
        batch_count=int(_number(p, "n_iter")),
        hires=bool(getattr(p, "enable_hr", False)),
    )


def _number(p: Any, name: str) -> float:
    value = getattr(p, name, 0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _is_virtual(slot: Slot) -> bool:
    return slot.torch_device.type == virtual_gpu.DEVICE_TYPE


def _num_operations(slot: Slot) -> int:
    return virtual_gpu.get_device(slot.torch_device).num_operations if _is_virtual(slot) else 0


@dataclass(eq=False)
class _DriverSampler:
    """Samples the driver's view of the slots' GPUs, on its own thread, until stopped."""

    slots: tuple[Slot, ...]
    samples: list[SampleRecord] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _began_s: float = 0.0

    def start(self) -> None:
        self._began_s = time.perf_counter()
        self._thread = threading.Thread(target=self._sample, name="driver-samples", daemon=True)
        self._thread.start()

    def stop(self) -> list[SampleRecord]:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        return self.samples

    def _sample(self) -> None:
        """Includes both ends of the job: decoding comes last and needs the most memory, which the allocator still holds then."""
        self.sample_once()
        while not self._ended.wait(SAMPLE_EVERY_S):
            self.sample_once()
        self.sample_once()

    def sample_once(self) -> None:
        at_ms, cards = (time.perf_counter() - self._began_s) * 1000, read_telemetry()
        for slot in self.slots:
            card = find_telemetry(slot.torch_device, cards)
            if card is not None:
                self.samples.append(
                    SampleRecord(
                        at_ms=at_ms,
                        slot=slot.index,
                        utilization_percent=card.utilization_percent,
                        used_bytes=card.used_bytes,
                        power_watts=card.power_watts,
                        temperature_celsius=card.temperature_celsius,
                    )
                )


# torch's profiler, controlled by Forge's settings


def _start_torch_profiler(options: Any) -> Any:
    """The started profiler if the settings enable it; None otherwise."""
    if not options.profiling_enable:
        return None
    known = {"CPU": torch.profiler.ProfilerActivity.CPU, "CUDA": torch.profiler.ProfilerActivity.CUDA}
    wanted = {known[name] for name in options.profiling_activities if name in known}
    activities = wanted & set(torch.profiler.supported_activities())
    if not activities:
        log.warning("profiling_activities: cannot profile %s here; nothing is profiled.", ", ".join(options.profiling_activities) or "nothing")
        return None
    started = torch.profiler.profile(
        activities=sorted(activities, key=str),
        record_shapes=_may_record_shapes(bool(options.profiling_record_shapes)),
        profile_memory=bool(options.profiling_profile_memory),
        with_stack=bool(options.profiling_with_stack),
    )
    started.start()
    return started


def _may_record_shapes(is_wanted: bool) -> bool:
    """With shapes, the profiler keeps references to tensors, so that virtual GPUs cannot move them in place."""
    if is_wanted and torch.__future__.get_swap_module_params_on_conversion():
        log.warning("profiling_record_shapes has no effect with virtual GPUs: it would prevent moving their weights.")
        return False
    return is_wanted


def _finish_torch_profiler(running: Any, app: JobContext) -> None:
    """Write torch's profile under the name in the settings, in the folder for such profiles. Other files there stay untouched."""
    if running is None:
        return
    running.stop()
    name, folder = str(app.options.profiling_filename), app.config.data_dir / LOG_FOLDER / PROFILER_FOLDER
    try:
        check_log_name("profiling_filename", name)
        path = _export_trace(running, folder, name)
    except OptionError as error:
        log.warning("The profile was not written: %s", error)
        return
    except (OSError, RuntimeError) as error:
        log.warning("profiling_filename: %s could not be written (%s).", folder / name, error)
        return
    log.info("torch's profile of the job: %s", path)


def _export_trace(running: Any, folder: Path, name: str) -> Path:
    """The path of the written trace: `name`, or a free name if `name` is not an earlier trace. Raises OSError, RuntimeError."""
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / name
        running.export_chrome_trace(str(written))
        with written.open("rb") as trace:
            path = folder / name
            return write_whole(lambda file: shutil.copyfileobj(trace, file), numbered_names(path), replace=_is_trace(path))


def _is_trace(path: Path) -> bool:
    """Whether torch's profiler wrote the file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return not path.is_symlink() and _TRACE_BEGINS_WITH in file.read(64)
    except OSError:
        return False
