"""A Flux.1 transformer on two CPU slots: replicas for CFG, layers for two images and for one; and what two threads without a plan reach here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from backend.families.flux.key_map import flux_key_map
from backend.families.flux.program import build_flux_program
from backend.modules.k_model import KModel
from backend.modules.k_prediction import FlowPrediction
from backend.parallel.placing.fleet import current_fleet
from backend.parallel.running.session import SamplingRequest, begin_session, end_session
from backend.patcher.unet import UnetPatcher
from benchmarks._multi_slot import TWO_SLOTS, use_slots
from tools.measure import Bench, Metrics, Variant

CONFIG: dict[str, Any] = {
    "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 6, "attention_head_dim": 64, "joint_attention_dim": 256,
    "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (8, 28, 28),
}  # fmt: skip
"""Few blocks, but wide enough that matrices take the time: 384 wide, 42 M weights."""
LATENT_SIDE, TEXT_TOKENS = 48, 64
"""576 tokens of the picture. With fewer, reading the weights takes a larger part of the time, which two cores share and which two rows in one batch
do once; the published network has 4096 at 1024x1024."""
NUM_ROWS = 16
"""Rows of every call: one image for sixteen steps, or two rows for eight."""
ATOL = 1e-4
"""Two rows in one batch are rounded otherwise than two batches of one."""


def _make_variants() -> Mapping[str, Variant]:
    use_slots(TWO_SLOTS)
    torch.manual_seed(1)
    flux = FluxTransformer2DModel(**CONFIG).eval().requires_grad_(False)
    model = KModel(flux, FlowPrediction(multiplier=1.0), build_program=build_flux_program, key_map=flux_key_map(flux))
    unet = UnetPatcher(model, current_fleet().primary.torch_device, torch.device("cpu"))
    one_image, cfg = SamplingRequest(images=1, branches=1, steps=NUM_ROWS), SamplingRequest(images=1, branches=2, steps=NUM_ROWS // 2)
    two_images = SamplingRequest(images=2, branches=1, steps=NUM_ROWS // 2, may_use_lanes=True)
    jobs = {
        "one slot, one image": (one_image, "single", _one_by_one),
        "one slot, CFG": (cfg, "single", _in_pairs),
        "replicas, CFG": (cfg, "replicas", _in_pairs),
        "layers, two images": (two_images, "layers", _in_lanes),
        "layers, one image": (one_image, "layers", _one_by_one),
    }
    calls = {name: _make_job(unet, request, strategy, run) for name, (request, strategy, run) in jobs.items()}
    found = {name: run(unet) for name, (request, strategy, run) in jobs.items() if _begin(unet, request, strategy)}
    end_session(unet)
    calls["no plan, two threads"] = lambda: _run_without_plan(unet)
    wanted = found["one slot, one image"]
    for name, rows in found.items():
        if not torch.allclose(rows, wanted, atol=ATOL):
            raise AssertionError(f"{name}: differs from one slot by {float((rows - wanted).abs().max())}; {ATOL} is rounding.")
    return calls


def _begin(unet: UnetPatcher, request: SamplingRequest, strategy: str) -> bool:
    """Start the job's plan. Raises: AssertionError if it is another one than was asked for."""
    end_session(unet)
    chosen = SamplingRequest(
        images=request.images, branches=request.branches, steps=request.steps, may_use_lanes=request.may_use_lanes, strategy=strategy,  # type: ignore[arg-type]
    )  # fmt: skip
    session = begin_session(unet, (request.images, 16, LATENT_SIDE, LATENT_SIDE), chosen)
    if session is None or session.plan.strategy != strategy:
        raise AssertionError(f"{strategy} was asked for; the plan is {session and session.plan.reason}")
    return True


def _make_job(unet: UnetPatcher, request: SamplingRequest, strategy: str, run: Callable[[UnetPatcher], Tensor]) -> Variant:
    def job() -> Metrics:
        _begin(unet, request, strategy)
        run(unet)
        return {}

    return job


def _inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "x": torch.randn(1, 16, LATENT_SIDE, LATENT_SIDE, generator=generator).repeat(rows, 1, 1, 1),
        "t": torch.full((rows,), 0.5),
        "c_crossattn": torch.randn(1, TEXT_TOKENS, CONFIG["joint_attention_dim"], generator=generator).repeat(rows, 1, 1),
        "y": torch.randn(1, CONFIG["pooled_projection_dim"], generator=generator).repeat(rows, 1),
        "guidance": torch.full((rows,), 3.5),
    }


def _one_by_one(unet: UnetPatcher) -> Tensor:
    """The last of all rows, each a step of one image."""
    for _ in range(NUM_ROWS):
        row = unet.model.apply_model(**_inputs(1))
    return row


def _in_pairs(unet: UnetPatcher) -> Tensor:
    """A step of one image is two rows in one call."""
    for _ in range(NUM_ROWS // 2):
        rows = unet.model.apply_model(**_inputs(2))
    return rows[:1]


def _run_without_plan(unet: UnetPatcher) -> Metrics:
    """What the machine gives: two threads that know nothing of each other and run half the rows each."""
    end_session(unet)

    def half(_: int) -> None:
        torch.set_num_threads(1)
        for _ in range(NUM_ROWS // 2):
            unet.model.apply_model(**_inputs(1))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, range(2)))
    return {}


def _in_lanes(unet: UnetPatcher) -> Tensor:
    """Two images, each with its own loop, as sampling runs them on a cut network."""

    def lane(_: int) -> Tensor:
        for _ in range(NUM_ROWS // 2):
            row = unet.model.apply_model(**_inputs(1))
        return row

    with ThreadPoolExecutor(2) as pool:
        return next(iter(pool.map(lane, range(2))))


BENCH = Bench(
    question=(
        f"How long do {NUM_ROWS} rows take through a Flux.1 transformer ({CONFIG['num_layers']} double and {CONFIG['num_single_layers']} single "
        f"blocks, 384 wide, fp32, {LATENT_SIDE**2 // 4} picture and {TEXT_TOKENS} text tokens) on one CPU slot of one core and on two? Asked for: "
        "replicas at least 1.90x of one slot for CFG, layers at least 1.75x for two images, and less than 2 % slower for one image. Two threads "
        "without a plan show what this machine gives."
    ),
    make_variants=_make_variants,
    baseline="one slot, one image",
    num_rounds=5,
    work_per_call=NUM_ROWS,
    work_unit="rows",
    packages=("torch", "diffusers"),
)
