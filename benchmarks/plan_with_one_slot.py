"""What does planning cost if only one slot computes anyway?"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks._multi_slot import TWO_SLOTS, UNET_PHASE, make_application, run_job, use_slots
from tools.measure import Bench, Metrics, Variant

ONE_SLOT = ("cpu",)
NUM_STEPS = 6


def make_variants() -> Mapping[str, Variant]:
    """The same job on one slot: without plans, with only one slot; and with a plan that chooses one slot of two."""
    app = make_application()

    def variant(device_ids: tuple[str, ...], strategy: str) -> Variant:
        def call() -> Metrics:
            use_slots(device_ids)
            return run_job(app, strategy, num_images=1, num_steps=NUM_STEPS, side_px=384)[0]

        return call

    return {"plain path": variant(ONE_SLOT, "auto"), "plan with one slot": variant(TWO_SLOTS, "single")}


BENCH = Bench(
    question=(
        f"What does planning cost where one slot computes anyway: the UNet phase of one image with CFG, {NUM_STEPS} Euler steps, 384 pixels, a "
        "narrow SD1.x network, one core? Asked for: within 1 %."
    ),
    make_variants=make_variants,
    baseline="plain path",
    num_rounds=7,
    work_per_call=NUM_STEPS,
    work_unit="steps",
    packages=("torch", "diffusers"),
    time_metric=UNET_PHASE,
)
