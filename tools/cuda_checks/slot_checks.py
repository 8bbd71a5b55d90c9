"""One GPU as two slots: results of a split network against the unsplit one, repeatedly, with and without copies on separate streams."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.devices import link_test
from backend.devices.slot import Slot
from backend.parallel.exchange import link_speeds
from backend.parallel.running.session import SamplingRequest, begin_session, end_session
from modules.processing import process_images
from tools.cuda_checks.machine import Machine, difference
from tools.cuda_checks.networks import application, build_patcher, txt2img
from tools.cuda_checks.runner import Report
from tools.cuda_checks.speed_checks import make_call

_ROOT_MARK = "tools"


def check_split(machine: Machine, report: Report) -> None:
    """Network calls with replicas and layers, against the same rows one by one on one slot. Same shapes, so bit-equal."""
    families = machine.pick((("sd15", torch.float16), ("sd15", torch.bfloat16), ("sdxl", torch.float16)), (("sd15", machine.dtype),))
    for family, dtype in families:
        machine.use(2)
        unet = build_patcher(machine, family, dtype)
        call = make_call(machine, unet, family, num_rows=2)
        alone = torch.cat([unet.model.run_here(call.take_rows(row, row + 1)) for row in range(2)]).clone()
        together = unet.model.run_here(call).clone()
        report.value(f"{family} {dtype}: two rows in one batch against one by one", **difference(together, alone))
        for strategy in ("replicas", "layers"):
            for asynchronous in (True, False):
                _repeat(machine, report, unet, call, alone, f"{family} {dtype}", strategy, asynchronous)
        del unet, call, alone, together
        machine.use()
        machine.settle()


def _repeat(machine: Machine, report: Report, unet: Any, call: Any, alone: Tensor, what: str, strategy: Any, asynchronous: bool) -> None:
    num_repeats = machine.pick(20, 2)
    request = SamplingRequest(images=1, branches=2, strategy=strategy, asynchronous=asynchronous)
    session = begin_session(unet, tuple(call.rows["x"].shape[:1] and (1, *call.rows["x"].shape[1:])), request)
    assert session is not None
    try:
        outputs = [unet.model.run_network(call).clone() for _ in range(num_repeats)]
        step_ms = machine.median_ms(lambda: unet.model.run_network(call), times=machine.pick(5, 1), warmups=0)
    finally:
        end_session(unet)
    machine.sync()
    diff = difference(outputs[0], alone)
    num_other = sum(not torch.equal(output, outputs[0]) for output in outputs)
    name = f"{what}, {strategy}, {'copies on their own streams' if asynchronous else 'no streams of copies'}"
    report.expect(f"{name}: as alone", diff["equal"], plan=session.plan.strategy, step_ms=round(step_ms, 2), **diff)
    report.expect(f"{name}: {num_repeats} times the same", num_other == 0, differing=num_other)


def check_jobs_on_two_slots(machine: Machine, report: Report) -> None:
    """Whole jobs through the product, two pictures with lanes, against one slot."""
    with application(machine, "sd15") as app:
        app.options.set("multi_gpu_strategy", "single")
        fields = {"batch_size": 2, "steps": machine.pick(6, 2)}
        machine.use(2)
        expected = pixels(process_images(txt2img(machine, "sd15", **fields)))
        for strategy in ("replicas", "layers", "auto"):
            for asynchronous in (True, False):
                app.options.set("multi_gpu_strategy", strategy)
                found = []
                for _ in range(machine.pick(5, 2)):
                    request = txt2img(machine, "sd15", **fields)
                    request.enable_async_gpu = asynchronous
                    found.append(pixels(process_images(request)))
                name = f"{strategy}, {'asynchronous' if asynchronous else 'synchronous'}"
                diff = np.abs(found[0] - expected)
                report.expect(f"{name}: same picture as one slot", diff.max() <= 8, max=int(diff.max()), mean=float(diff.mean()))
                spread = max(int(np.abs(one - found[0]).max()) for one in found)
                report.expect(f"{name}: the same every time, but for rounding", spread <= 8, max=spread)  # rows are dealt by measured speed


def pixels(done: Any) -> np.ndarray:
    return np.stack([np.asarray(image.convert("RGB")).astype(int) for image in done.images])


def check_links(machine: Machine, report: Report) -> None:
    """The link test with one GPU: its verdict for two slots on it, the probe's process, and the speed of the host link."""
    slots = tuple(Slot(index, machine.device, "one card", 2**30) for index in range(2))
    report.value("two slots on one device", **{f"{pair}": str(verdict) for pair, verdict in link_test.link_verdicts(slots).items()})
    if not machine.is_cuda:
        return
    result = link_test.run_probe(((0, 0),))
    report.expect("the probe's process answers", result.ending == "done", ending=result.ending, reports=str(dict(result.reports)))
    for to_device in (True, False):
        bytes_per_ms, latency_ms = link_speeds.time_host_copy(machine.device, to_device=to_device)
        report.value(f"{'to' if to_device else 'from'} the card", gb_per_s=round(bytes_per_ms / 1e6, 2), latency_ms=latency_ms)


def check_sanitizer(machine: Machine, report: Report) -> None:
    """A narrow network over two slots under compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    code = "from tools.cuda_checks.slot_checks import run_narrow; run_narrow()"
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
        if not machine.is_cuda:
            command = [sys.executable, "-c", code]
        environment = {**os.environ, "CUDA_CHECKS_DEVICE": machine.kind, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        except (subprocess.TimeoutExpired, OSError) as error:
            report.value(f"{tool} did not finish", why=repr(error)[:300])
            continue
        report.expect(f"{tool} finds nothing", done.returncode == 0, rc=done.returncode, tail=(done.stdout + done.stderr)[-600:])


def run_narrow() -> None:
    """One split step of a narrow network, for running this process in a debugger."""
    from pathlib import Path

    machine = Machine(kind=os.environ["CUDA_CHECKS_DEVICE"], tiny=True, shared_dir=Path(), out_dir=Path())
    with machine.working("narrow"):
        machine.use(2)
        unet = build_patcher(machine, "sd15")
        call = make_call(machine, unet, "sd15", num_rows=2)
        for strategy in ("layers", "replicas"):
            begin_session(unet, (1, *call.rows["x"].shape[1:]), SamplingRequest(images=1, branches=2, strategy=strategy))
            unet.model.run_network(call)
            end_session(unet)
        machine.sync()
    print("ran")
