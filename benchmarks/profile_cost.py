"""What does recording a job with --profile cost per step, compared with the same job without?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from benchmarks._multi_slot import CFG, TWO_SLOTS, UNET_PHASE, make_application, run_job, use_slots
from modules.jobs import observer
from tools.measure import Bench, Metrics, Variant

NUM_STEPS, SIDE_PX = 6, 256
ROUNDS = 25
CPU = "CPU s of the job"
"""Of all threads of the process; other programs on the machine touch it less than the clock."""


def make_variants() -> Mapping[str, Variant]:
    """The same application with and without the flag. Files are not included: they are written after the job."""
    app = make_application()
    use_slots(TWO_SLOTS)
    observer.write_job = lambda folder, job: None  # type: ignore[assignment]
    plain = app.config
    recording = dataclasses.replace(plain, backend=dataclasses.replace(plain.backend, profile=True))

    def variant(config: object) -> Variant:
        def run() -> Metrics:
            app.config = config  # type: ignore[assignment]
            began_s = time.process_time()
            metrics, _ = run_job(app, "layers", num_images=2, num_steps=NUM_STEPS, side_px=SIDE_PX)
            return {**metrics, CPU: time.process_time() - began_s}

        return run

    variants = {"without": variant(plain), "--profile": variant(recording)}
    for run in variants.values():
        run()
    return variants


BENCH = Bench(
    question=(
        f"What does --profile cost? Two CPU slots of one core each, 2 images with CFG {CFG}, strategy layers, which has the most spans and copies "
        f"of all plans, {NUM_STEPS} Euler steps of a narrow SD1.x network, {SIDE_PX} pixels. Timed: the UNet phase. Asked for: below 1 % of a step."
    ),
    make_variants=make_variants,
    baseline="without",
    num_rounds=ROUNDS,
    work_per_call=2 * NUM_STEPS,
    work_unit="image steps",
    packages=("torch", "diffusers", "transformers"),
    time_metric=UNET_PHASE,
)
