"""Families in their published sizes, without weights: bytes, FLOPs, working memory, and plans for cards that users have.

References: the numbers of parameters and of FLOPs at 1024x1024 that the field gives for the transformers (with SD3's table of positions).
"""

from __future__ import annotations

import pytest

from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.registry import find_family
from backend.parallel.planning.simulation import SimulatedJob, model_config, parse_cards, profile_model, simulate

PUBLISHED = {
    "chroma": (8.900e9, 74.4e12),
    "sd35-medium": (2.243e9 + 384**2 * 1536, 11.3e12),
    "sd35-large": (8.057e9 + 192**2 * 2432 - 38 * 4 * 64, 31.1e12),
    "flux2-klein-4b": (3.876e9, 34.8e12),
    "flux2-klein-9b": (9.079e9, 75.5e12),
    "z-image": (6.155e9, 56.6e12),
    "lumina2": (2.610e9, 23.9e12),
    "qwen-image": (20.43e9, 70.6e12),
    "krea2": (12.82e9, 118.8e12),
    "anima": (2.09e9, 18.0e12),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_and_work_are_the_published_ones(name: str) -> None:
    parameters, flops = PUBLISHED[name]
    profile = profile_model(name, 1024, 1024)
    assert profile.weight_bytes == pytest.approx(2 * parameters, rel=0.002)
    assert profile.flops_per_row == pytest.approx(flops, rel=0.01)


@pytest.mark.nightly
@pytest.mark.parametrize("name", PUBLISHED)
def test_in_fp8_tables_and_norms_stay_in_bf16(name: str) -> None:
    assert profile_model(name, 1024, 1024, "fp8").weight_bytes == pytest.approx(PUBLISHED[name][0], rel=0.12)


@pytest.mark.nightly
@pytest.mark.parametrize("side_px", [512, 1024, 2048])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_estimate_of_working_memory_lies_over_what_is_counted(name: str, side_px: int) -> None:
    family = find_family(model_config(name)["family"])
    program = family.build_program(family.build_denoiser(FoundDenoiser(part=Part("", Layout.DIFFUSERS), config=model_config(name)["denoiser"])))
    counted = profile_model(name, side_px, side_px).working_bytes_per_row()
    side = side_px // family.latent.factor
    assert counted < program.working_bytes((1, family.latent.channels, side, side), 2) < 2 * counted


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "gpus", "weights", "strategy"),
    [
        ("chroma", "2xRTX3060", "half", "layers"),
        ("chroma", "2xRTX3070", "fp8", "layers"),
        ("chroma", "2xRTX4060Ti16", "fp8", "replicas"),
        ("sd35-large", "2xRTX3060", "half", "layers"),
        ("sd35-medium", "2xRTX3090", "half", "replicas"),
        ("flux2-klein-9b", "2xRTX3060", "half", "layers"),
    ],
)
def test_plans_are_those_of_the_docs(name: str, gpus: str, weights: str, strategy: str) -> None:
    """Families with CFG run both branches side by side where two copies fit, else in layers."""
    simulation = simulate(SimulatedJob(cards=parse_cards(gpus), model=name, weights=weights, branches=2))
    plan, room = simulation.plan, {slot.index: slot.total_bytes for slot in simulation.slots}
    assert plan.strategy == strategy and set(plan.used_slots) == {0, 1}
    assert all(plan.predicted_bytes[slot] < room[slot] for slot in room)
