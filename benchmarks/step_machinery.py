"""How many Python calls does a denoising step make outside of the network's layers, on one slot and per slot on two?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from backend.parallel.placing.fleet import current_fleet
from benchmarks._multi_slot import make_application, run_job, use_slots
from modules.application import Application
from tools.measure import Bench, Metrics, Variant
from tools.step_calls import count_step_calls, programs_of

SIDE_PX = 64


def _count(app: Application, device_ids: tuple[str, ...], strategy: str, images: int, cfg: float) -> Metrics:
    use_slots(device_ids)

    def job(num_steps: int) -> None:
        run_job(app, strategy, num_images=images, num_steps=num_steps, side_px=SIDE_PX, cfg=cfg)

    job(5)
    calls = count_step_calls(job, programs_of(app.models.engine.forge_objects.unet), current_fleet())
    return {"calls a step": calls.total, "calls a step and slot": calls.total / len(device_ids), "CPU ms a step": calls.cpu_ms}


def make_variants() -> Mapping[str, Variant]:
    app = make_application()
    return {
        "one slot, CFG": partial(_count, app, ("cpu",), "auto", 1, 7.0),
        "one slot, no CFG": partial(_count, app, ("cpu",), "auto", 1, 1.0),
        "two slots, replicas": partial(_count, app, ("cpu", "cpu"), "replicas", 1, 7.0),
        "two slots, layers, 2 images": partial(_count, app, ("cpu", "cpu"), "layers", 2, 7.0),
    }


BENCH = Bench(
    question=(
        "How many Python calls does a denoising step make outside of the network's layers? Counted with sys.setprofile in all threads, as the "
        f"difference of a run of 9 steps and one of 5; narrow SD1.x, {SIDE_PX} pixels, Euler. The layers of such a network make about 7,000. Asked "
        "for: at most 100 on one slot and per slot. CPU ms: of a step with everything, without the counter."
    ),
    make_variants=make_variants,
    baseline="one slot, CFG",
    num_rounds=3,
    num_warmups=0,
    packages=("torch", "diffusers"),
)
