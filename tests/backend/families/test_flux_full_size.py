"""Flux.1 in its published size, without weights: bytes, FLOPs, and the plans for cards that users have.

References: the numbers of parameters and FLOPs that the field gives for the transformer (11.9e9; 74 TFLOP at 1024x1024 with 512 tokens of text).
"""

from __future__ import annotations

import pytest

from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.registry import find_family
from backend.parallel.planning.simulation import (
    SimulatedJob,
    Simulation,
    component_costs,
    model_config,
    parse_cards,
    profile_model,
    report,
    simulate,
)


def plan_for(gpus: str, *, weights: str = "half", images: int = 1) -> Simulation:
    return simulate(SimulatedJob(cards=parse_cards(gpus), model="flux-dev", weights=weights, images=images, branches=1))


def test_bytes_and_work_are_the_published_ones() -> None:
    half, fp8 = profile_model("flux-dev", 1024, 1024), profile_model("flux-dev", 1024, 1024, "fp8")
    assert half.weight_bytes == pytest.approx(2 * 11.9e9, rel=0.005) and fp8.weight_bytes == pytest.approx(11.9e9, rel=0.005)
    assert half.flops_per_row == pytest.approx(74.4e12, rel=0.01)
    assert profile_model("flux-schnell", 1024, 1024).weight_bytes == pytest.approx(2 * 11.891e9, rel=0.001)
    double, single = half.pieces[3], half.pieces[30]
    assert (double.weight_bytes, single.weight_bytes) == (2 * 339_831_296, 2 * 141_591_808)
    assert double.flops_per_row == pytest.approx(single.flops_per_row, rel=0.001), "equal time, 2.4 times the bytes"
    assert single.hidden_bytes_per_row == 2 * 3072 * (4096 + 512), "one tensor crosses a cut"


def test_the_estimate_of_working_memory_lies_over_what_is_counted() -> None:
    family = find_family("flux")
    denoiser = family.build_denoiser(FoundDenoiser(part=Part("", Layout.DIFFUSERS), config=model_config("flux-dev")["denoiser"]))
    program = family.build_program(denoiser)
    for side_px in (512, 1024, 2048):
        counted = profile_model("flux-dev", side_px, side_px).working_bytes_per_row()
        assert counted < program.working_bytes((1, 16, side_px // 8, side_px // 8), 2) < 2 * counted


@pytest.mark.parametrize(("gpus", "weights"), [("2xRTX4060Ti16", "half"), ("2xRTX3070", "fp8")])
def test_two_small_cards_hold_one_copy_in_even_shares(gpus: str, weights: str) -> None:
    """bf16 on 2 x 16 GB, fp8 on 2 x 8 GB: less than 10 % between them, one tensor crosses, the text encoders take turns with the transformer."""
    simulation = plan_for(gpus, weights=weights)
    plan, room = simulation.plan, {slot.index: slot.total_bytes for slot in simulation.slots}
    assert plan.strategy == "layers" and set(plan.used_slots) == {0, 1}
    held = plan.predicted_bytes
    assert all(held[slot] < room[slot] for slot in held) and abs(held[0] - held[1]) < 0.1 * max(held.values())
    assert plan.crossing_bytes < 40e6
    assert "text encoders and VAE rest in main memory" in report(simulation)


def test_a_second_card_takes_the_text_encoders() -> None:
    for gpus, denoiser, encoders in (("2xRTX3090", 0, 1), ("RTX3060,RTX3090", 1, 0)):
        plan = plan_for(gpus).plan
        assert plan.strategy == "single" and plan.used_slots == (denoiser,) and plan.component_slots["text encoders"] == encoders


def test_two_pictures_flow_through_two_cards() -> None:
    """Twice the pictures in nearly the time of one, as both cards work."""
    one, two = plan_for("2xRTX4060Ti16").plan, plan_for("2xRTX4060Ti16", images=2).plan
    assert two.lanes == 2 and two.predicted_ms < 1.2 * one.predicted_ms


def test_one_card_of_24_gb_holds_the_transformer_alone() -> None:
    plan = plan_for("RTX4090").plan
    assert plan.is_single and "stream" not in plan.reason


@pytest.mark.parametrize(("weights", "gigabytes"), [("q8_0", 12.66), ("q4_k", 6.72), ("nf4", 6.72), ("fp8_scaled", 11.91)])
def test_bytes_in_low_bits_are_the_published_ones(weights: str, gigabytes: float) -> None:
    """The sizes that the field gives for files of these types."""
    packed, half = profile_model("flux-dev", 1024, 1024, weights), profile_model("flux-dev", 1024, 1024)
    assert packed.weight_bytes == pytest.approx(gigabytes * 1e9, rel=0.01)
    largest = 3072 * 15360
    assert 2 * largest < packed.working_bytes_per_row() - half.working_bytes_per_row() <= 7 * largest, "the largest matrix, dequantized"


def test_two_cards_of_8_gb_hold_flux_in_eight_bits_together_and_in_four_bits_each() -> None:
    """Q8_0 in even shares; Q4_K as two replicas, while the text encoders rest in main memory."""
    held = plan_for("2xRTX3070", weights="q8_0").plan.predicted_bytes
    assert set(held) == {0, 1} and abs(held[0] - held[1]) < 0.1 * max(held.values())
    simulation = plan_for("2xRTX3070", weights="q4_k", images=2)
    assert simulation.plan.strategy == "replicas" and set(simulation.plan.used_slots) == {0, 1}
    assert "text encoders and VAE rest in main memory" in report(simulation)


@pytest.mark.parametrize(
    ("gpus", "weights", "most_streamed_gb"),
    [("2xRTX3060", "half", 2.6), ("2xRTX3080", "half", 7.0), ("2xRTX3070:6", "fp8", 3.3)],
)
def test_layers_with_a_streamed_rest(gpus: str, weights: str, most_streamed_gb: float) -> None:
    """bf16 on 2 x 12 and 2 x 10 GB, fp8 on 2 x 6 GB: both cards full, only what is missing streams, and that takes less time than one card alone."""
    simulation, alone = plan_for(gpus, weights=weights), plan_for(gpus.removeprefix("2x"), weights=weights)
    plan = simulation.plan
    streamed = sum(one.streamed_bytes for one in plan.streamed.values())
    room = sum(slot.budget_bytes for slot in simulation.slots)
    assert plan.is_one_cut and set(plan.used_slots) == {0, 1}
    assert 0 < simulation.profile.weight_bytes + 2 * simulation.profile.working_bytes_per_row() - room < streamed < most_streamed_gb * 1e9
    assert all(plan.predicted_bytes[slot.index] <= slot.budget_bytes for slot in simulation.slots)
    assert plan.predicted_ms < 0.9 * alone.plan.predicted_ms
    printed = report(simulation)
    assert printed.count("of its weights stream from main memory") == len([one for one in plan.streamed.values() if one.streamed_bytes])
    assert "x of streaming to slot 0 alone" in printed


def test_sdxl_streams_over_two_cards_of_3_gb() -> None:
    simulation = simulate(SimulatedJob(cards=parse_cards("2xRTX3070:3"), model="sdxl"))
    plan = simulation.plan
    assert plan.is_one_cut and sum(one.streamed_bytes for one in plan.streamed.values()) > simulation.profile.weight_bytes - 2 * 2 * 2**30
    assert plan.predicted_ms < simulate(SimulatedJob(cards=parse_cards("RTX3070:3"), model="sdxl")).plan.predicted_ms


def test_a_controlnet_counts_with_the_residuals_that_a_usual_one_has() -> None:
    """Fifteen, of 25 to 28 MB each, not one for each of the 57 blocks; and a sixth to a half of the transformer's weights."""
    profile = profile_model("flux-dev", 1024, 1024)
    assert 15 * 25e6 < profile.control_bytes_per_row < 15 * 29e6
    (control,) = [one for one in component_costs("flux-dev", 1024, 1024, has_controlnet=True) if one.runs_per_row]
    assert profile.weight_bytes / 6 < control.weight_bytes < profile.weight_bytes / 2
    assert 0.2 < control.flops_per_row / profile.flops_per_row < 0.35
