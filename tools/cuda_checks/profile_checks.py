"""`--profile` on a GPU: its numbers against torch's and the driver's, its cost, and the timeline to look at."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from typing import Any

import torch

from modules.processing import process_images
from tools.cuda_checks.machine import GB, DriverPeak, Machine
from tools.cuda_checks.networks import application, txt2img
from tools.cuda_checks.runner import Report
from tools.measure import order_of_round


def check_profile(machine: Machine, report: Report) -> None:
    """profile.json's peaks against torch's statistics and NVML's samples, busy time against wall time, one slot and two."""
    family = machine.pick("sdxl", "sd15")
    with application(machine, family) as app:
        for num_slots, strategy in ((1, "single"), (2, "replicas"), (2, "layers")):
            if machine.kind == "virtual":  # each `use` creates new devices
                app.models.unload()
            machine.use(num_slots)
            app.options.set("multi_gpu_strategy", strategy)
            process_images(txt2img(machine, family, steps=2))
            _set_profile(app, True)
            machine.settle()
            with DriverPeak() as driver:
                seconds = machine.seconds(lambda: process_images(txt2img(machine, family, steps=machine.pick(8, 2))))
            peak = machine.peak_gb()
            _set_profile(app, False)
            _compare(machine, report, app.last_profile, f"{num_slots} slot(s), {strategy}", seconds, peak, driver.used_bytes)
        for name in ("timeline.png", "profile.json"):  # of the last job, and of all jobs
            shutil.copyfile(app.config.data_dir / "logs" / name, machine.out_dir / name)
    machine.use()


def _set_profile(app: Any, is_on: bool) -> None:
    app.config = dataclasses.replace(app.config, backend=dataclasses.replace(app.config.backend, profile=is_on))


def _compare(machine: Machine, report: Report, job: Any, name: str, seconds: float, peak: dict[str, Any], driver_bytes: int | None) -> None:
    report.value(
        name, wall_s=round(seconds, 3), job_wall_s=round(job.wall_ms / 1000, 3), plan=job.plans[-1].strategy if job.plans else None,
        step_network_ms=round(statistics.median(step.network_ms for step in job.steps), 2), steps=len(job.steps), dropped=job.dropped_spans,
        predicted_step_ms=job.prediction.predicted_step_ms, measured_step_ms=job.prediction.measured_step_ms,
    )  # fmt: skip
    for slot in job.slots:
        sums = slot.busy_ms + slot.wait_ms
        report.expect(f"{name}, slot {slot.slot}: busy and waiting make up the wall", abs(sums / job.wall_ms - 1) < 0.02, sums_ms=sums)
        report.value(
            f"{name}, slot {slot.slot}", busy_share=round(slot.busy_share, 4), busy_ms=slot.busy_ms_by_kind, waits_ms=slot.wait_ms_by_cause,
            driver_utilization_percent=slot.driver_utilization_percent,
        )  # fmt: skip
        told = slot.peak
        if told.allocated_bytes is not None and peak["allocated_gb"] is not None:
            diff_gb = abs(told.allocated_bytes / GB - peak["allocated_gb"])
            report.expect(f"{name}, slot {slot.slot}: peak is torch's", diff_gb < 0.002, profile_gb=told.allocated_bytes / GB, **peak)
        if told.driver_bytes is not None and driver_bytes is not None:
            off = told.driver_bytes / driver_bytes
            report.expect(
                f"{name}, slot {slot.slot}: driver's peak", 0.9 < off < 1.001, profile_gb=told.driver_bytes / GB, sampled_gb=driver_bytes / GB
            )


def check_profile_cost(machine: Machine, report: Report) -> None:
    """Step time with and without --profile, alternating."""
    num_steps, num_rounds = machine.pick(10, 2), machine.pick(7, 2)
    for num_slots, strategy in ((1, "single"), (2, "layers")):
        machine.use(num_slots)
        with application(machine, "sd15") as app:
            app.options.set("multi_gpu_strategy", strategy)
            times: dict[str, list[float]] = {"off": [], "on": []}
            process_images(txt2img(machine, "sd15", steps=2))
            for index in range(num_rounds):
                for name in order_of_round(list(times), index):
                    _set_profile(app, name == "on")
                    times[name].append(_sampling_seconds(machine, num_steps))
            _set_profile(app, False)
        per_step_ms = {name: statistics.median(all_s) / num_steps * 1000 for name, all_s in times.items()}
        ratio = statistics.median(on / off for on, off in zip(times["on"], times["off"]))
        report.expect(f"{strategy}: below 1 % of step time", ratio < 1.01, ratio=round(ratio, 4), ms_per_step=per_step_ms, raw_s=times)


def _sampling_seconds(machine: Machine, num_steps: int) -> float:
    """Time from noise to latents for one request."""
    request = txt2img(machine, "sd15", steps=num_steps)
    sample, seconds = request.sample, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        result: list[torch.Tensor] = []
        seconds.append(machine.seconds(lambda: result.append(sample(*args, **kwargs))))
        return result[0]

    request.sample = timed  # type: ignore[method-assign]
    process_images(request)
    return seconds[0]
