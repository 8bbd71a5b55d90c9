"""Seconds per step with one and two ControlNets: on one slot, before the denoiser on two slots, and as placed by the plan on two slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel

from backend.nn.controlnet import ControlNetwork
from backend.patcher.controlnet import ControlNet, apply_controlnet_advanced
from backend.sampling import sampling_function
from benchmarks._multi_slot import CFG, TOLERANCE, TWO_SLOTS, UNET_PHASE, make_application, run_job, use_slots
from modules.application import Application
from tools.measure import Bench, Metrics, Variant

NUM_STEPS, SIDE_PX = 5, 320
STEP = "step s"


def _with_controlnets(app: Application, count: int) -> Any:
    """The checkpoint's parts with this many random ControlNets of the same width, active in all steps."""
    parts = app.models.ensure_loaded().forge_objects_original
    patched = parts.shallow_copy()
    for seed in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: Any = ControlNetModel.from_unet(parts.unet.model.diffusion_model).eval().requires_grad_(False)
            for convolution in (*network.controlnet_down_blocks, network.controlnet_mid_block):
                convolution.weight.normal_(std=0.05)
        hint = torch.rand(1, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(seed))
        patched.unet = apply_controlnet_advanced(patched.unet, ControlNet(ControlNetwork(network)), hint, 1.0, 0.0, 1.0)
    return patched


@contextmanager
def _chosen(app: Application, parts: Any, *, is_planned: bool) -> Iterator[None]:
    """Jobs with these parts; without `is_planned`, ControlNets run for all rows before the denoiser, as if plans did not know them."""
    engine = app.models.ensure_loaded()
    original, defer = engine.forge_objects_original, sampling_function.list_deferrable
    engine.forge_objects_original = parts
    if not is_planned:
        sampling_function.list_deferrable = lambda chain, options: []
    try:
        yield
    finally:
        engine.forge_objects_original, sampling_function.list_deferrable = original, defer


def _make_variants() -> Mapping[str, Variant]:
    app = make_application()
    use_slots(TWO_SLOTS)
    variants: dict[str, Callable[[], tuple[Metrics, list[np.ndarray]]]] = {}
    for count in (1, 2):
        parts = _with_controlnets(app, count)
        for cfg, rows in ((CFG, "CFG"), (1.0, "no CFG")):
            for name, strategy, is_planned in (
                ("one slot", "single", False),
                ("two slots, before", "auto", False),
                ("two slots, planned", "auto", True),
            ):
                variants[f"{count} ControlNet{'s' * (count > 1)}, {rows}: {name}"] = _make_variant(app, parts, cfg, strategy, is_planned)
    _compare(variants)
    return {name: (lambda run=run: run()[0]) for name, run in variants.items()}


def _make_variant(app: Application, parts: Any, cfg: float, strategy: str, is_planned: bool) -> Callable[[], tuple[Metrics, list[np.ndarray]]]:
    def run() -> tuple[Metrics, list[np.ndarray]]:
        with _chosen(app, parts, is_planned=is_planned):
            metrics, pictures = run_job(app, strategy, num_images=1, num_steps=NUM_STEPS, side_px=SIDE_PX, cfg=cfg)
        return {STEP: metrics[UNET_PHASE] / NUM_STEPS}, pictures

    return run


def _compare(variants: Mapping[str, Callable[[], tuple[Metrics, list[np.ndarray]]]]) -> None:
    """Raises: AssertionError if plans make different pictures. Measuring runs come first."""
    pictures: dict[str, list[np.ndarray]] = {}
    for name, run in variants.items():
        job = name.split(":")[0]
        made = run()[1]
        worst = max(int(np.abs(one - other).max()) for one, other in zip(made, pictures.setdefault(job, made)))
        if worst > TOLERANCE:
            raise AssertionError(f"{name}: the picture differs by {worst} of 255 from that of one slot; {TOLERANCE} are rounding.")


BENCH = Bench(
    question=(
        f"How long is a step with one and two ControlNets, one picture of {SIDE_PX} pixels, with CFG (two rows) and without (one row)? On one CPU "
        "slot of one core; on two with the ControlNets before the denoiser on the first (as before plans knew them); on two as planned. "
        "A narrow SD1.x network, fp32."
    ),
    make_variants=_make_variants,
    baseline="1 ControlNet, CFG: one slot",
    num_rounds=3,
    packages=("torch", "diffusers", "transformers"),
    time_metric=STEP,
)
