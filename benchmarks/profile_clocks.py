"""How far are the times in a profile from independent clocks?"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from backend.nn.program import Program
from backend.nn.unet_program import UNetProgram
from benchmarks._multi_slot import make_application, run_job
from modules.application import Application
from modules.jobs import observer
from modules.jobs.profile_record import JobRecord
from tests.support.fleets import cpu_fleet, virtual_fleet
from tools.measure import Bench, Metrics, Variant

NUM_STEPS, SIDE_PX = 12, 128
WALL = "% of the wall time that busy and waiting times of a slot are off"
PIECES = "% of the wall time that a slot's stages are off the time in its pieces"
FLEETS = {"virtual GPUs": partial(virtual_fleet, 2), "CPU slots": partial(cpu_fleet, 2)}


class _Clocks:
    """The time that each thread spent in the network's pieces."""

    def __init__(self) -> None:
        self.spent_s: Counter[str] = Counter()
        Program.run_piece = self._timed(Program.run_piece)  # type: ignore[method-assign]
        UNetProgram.run_segments = self._timed(UNetProgram.run_segments)  # type: ignore[method-assign]

    def _timed(self, run: Callable[..., None]) -> Any:
        def timed(program: Program, what: Any, state: Any) -> None:
            began_s = time.perf_counter()
            run(program, what, state)
            self.spent_s[threading.current_thread().name] += time.perf_counter() - began_s

        return timed


def make_variants() -> Mapping[str, Variant]:
    """One job per kind of slot and plan, each with new slots; the worst slot counts."""
    app = make_application()
    app.config = dataclasses.replace(app.config, backend=dataclasses.replace(app.config.backend, profile=True))
    jobs: list[JobRecord] = []
    observer.write_job = lambda folder, job: jobs.append(job)  # type: ignore[assignment]
    clocks = _Clocks()
    return {
        f"{plan} on {kind}": partial(_compare, app, make_fleet, plan, jobs, clocks)
        for kind, make_fleet in FLEETS.items()
        for plan in ("replicas", "layers")
    }


def _compare(app: Application, make_fleet: Any, plan: str, jobs: list[JobRecord], clocks: _Clocks) -> Metrics:
    fleet: AbstractContextManager[Any] = make_fleet()
    app.models.unload()
    with fleet:
        run_job(app, plan, num_images=2, num_steps=1, side_px=SIDE_PX)
        clocks.spent_s.clear()
        began_s = time.perf_counter()
        run_job(app, plan, num_images=2, num_steps=NUM_STEPS, side_px=SIDE_PX)
        wall_ms = (time.perf_counter() - began_s) * 1000
        app.models.unload()
    job, off_wall, off_pieces = jobs[-1], [0.0], [0.0]
    for slot in job.slots:
        stages = [span for span in job.spans if span.slot == slot.slot and span.kind in ("network", "stage") and span.name != "time embedding"]
        spans_ms, pieces_ms = sum(span.end_ms - span.start_ms for span in stages), clocks.spent_s[f"slot-{slot.slot}"] * 1000
        off_wall.append(abs(slot.busy_ms + slot.wait_ms - wall_ms))
        off_pieces.append(abs(spans_ms - pieces_ms))
    return {WALL: 100 * max(off_wall) / wall_ms, PIECES: 100 * max(off_pieces) / wall_ms}


BENCH = Bench(
    question=(
        f"Do the times in a profile agree with clocks around the job and around the pieces of the network? Two slots, 2 images with CFG, {NUM_STEPS} "
        f"Euler steps of a narrow SD1.x network, {SIDE_PX} pixels. Asked for: less than 2 % of the wall time."
    ),
    make_variants=make_variants,
    baseline="replicas on virtual GPUs",
    num_rounds=5,
    packages=("torch", "diffusers", "transformers"),
)
