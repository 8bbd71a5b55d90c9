"""SDXL's text encoding on one and two CPU slots: the gain of a second copy of the encoders, or of one encoder per slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import wait

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from backend.parallel.placing.fleet import Fleet, current_fleet
from benchmarks._multi_slot import TWO_SLOTS, use_slots
from tools.measure import Bench, Metrics, Variant

SIZES = {"small": (768, 12, 12, 3072), "large": (1280, 32, 20, 5120)}
"""Width, layers, heads and inner width of the two encoders."""


def _make_encoder(name: str) -> CLIPTextModelWithProjection:
    width, layers, heads, inner = SIZES[name]
    config = CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner, projection_dim=width)
    return CLIPTextModelWithProjection(config).eval().requires_grad_(False)


def _make_variants() -> Mapping[str, Variant]:
    use_slots(TWO_SLOTS)
    fleet = current_fleet()
    encoders = {name: _make_encoder(name) for name in SIZES}
    tokens_BL = torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(1))
    cond, uncond = tokens_BL[:1], tokens_BL[1:]

    def encode(name: str, rows_BL: torch.Tensor) -> Callable[[], object]:
        return lambda: encoders[name](rows_BL, output_hidden_states=True)

    branches = [[encode(name, rows_BL) for name in SIZES] for rows_BL in (cond, uncond)]
    both = [[encode(name, rows_BL) for rows_BL in (cond, uncond)] for name in SIZES]
    return {
        "one slot": lambda: _run(fleet, [[*branches[0], *branches[1]]]),
        "one slot, both branches as one batch": lambda: _run(fleet, [[encode(name, tokens_BL) for name in SIZES]]),
        "a branch on each slot": lambda: _run(fleet, branches),
        "an encoder on each slot": lambda: _run(fleet, both),
    }


def _run(fleet: Fleet, work: list[list[Callable[[], object]]]) -> Metrics:
    futures = [fleet.worker(slot).submit(lambda tasks=tasks: [task() for task in tasks]) for slot, tasks in enumerate(work)]
    wait(futures)
    for future in futures:
        future.result()
    return {}


BENCH = Bench(
    question=(
        "How long do SDXL's two text encoders (full size, random weights, fp32) take for a prompt and a negative prompt, on one CPU slot of one core "
        "and on two, each with the encoders' weights at hand?"
    ),
    make_variants=_make_variants,
    baseline="one slot",
    num_rounds=5,
    packages=("torch", "transformers"),
)
