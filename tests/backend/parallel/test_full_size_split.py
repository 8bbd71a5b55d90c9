"""Requirements of issue and design for full-size SDXL: balance, share and traffic, by the planner's numbers and counted with fake tensors."""

from __future__ import annotations

import pytest

from backend.parallel.planning.candidate import JobShape
from backend.parallel.planning.cut_costs import MOST_IMBALANCE, MOST_WEIGHT_SHARE, Partition
from backend.parallel.planning.planner import make_plan
from backend.parallel.planning.simulation import card_links, card_slots, component_costs, profile_model
from benchmarks.full_size_split import CASES, count_case, cut_case

MB = 1e6
EQUAL_CARDS = [name for name in CASES if "+" not in name]


@pytest.fixture(scope="module")
def cuts() -> dict[str, Partition]:
    return {name: cut_case(case) for name, case in CASES.items()}


@pytest.mark.parametrize("name", EQUAL_CARDS)
def test_equal_cards_get_bytes_within_a_tenth_of_each_other(cuts: dict[str, Partition], name: str) -> None:
    peaks = cuts[name].peak_bytes.values()
    assert min(peaks) >= (1 - MOST_IMBALANCE) * max(peaks)


@pytest.mark.parametrize("name", CASES)
def test_no_card_gets_more_than_two_thirds(cuts: dict[str, Partition], name: str) -> None:
    found = cuts[name]
    assert max(found.weight_bytes.values()) <= MOST_WEIGHT_SHARE * sum(found.weight_bytes.values())
    assert set(found.replica.used_slots) == set(range(len(CASES[name].cards)))


def test_a_cut_with_little_traffic_exists_that_keeps_every_rule(cuts: dict[str, Partition]) -> None:
    found = cuts["2x24 GB, at most 12 MB"]
    assert found.rules_kept
    assert found.crossing_bytes < 12 * MB


def test_with_a_controlnet_its_residuals_are_what_is_added(cuts: dict[str, Partition]) -> None:
    """12 MB is not possible with balanced cards: residuals of the inner blocks must come from the card with the ControlNet."""
    found = cuts["2x24 GB, ControlNet, at most 25 MB"]
    assert found.rules_kept
    assert found.crossing_bytes <= 25 * MB
    assert 0 < found.control_bytes < 12 * MB


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ("2x24 GB", "2x24 GB, at most 12 MB")), "2x24 GB, ControlNet, at most 25 MB"]
)
def test_counted_bytes_are_the_predicted_ones(cuts: dict[str, Partition], name: str) -> None:
    """The executor runs the split network on fake tensors. Crossing bytes are exact except for timesteps and SDXL's vector, which stay."""
    counted = count_case(CASES[name])
    assert abs(counted["peak prediction off by %"]) < 6
    assert counted["between cards %"] < 10
    assert counted["most of the UNet %"] <= 65
    assert counted["crossing MB"] == pytest.approx(cuts[name].crossing_bytes / MB, rel=0.001)


@pytest.mark.parametrize(
    ("cards", "has_controlnet"), [(("RTX3090", "RTX3090"), False), (("RTX3090", "RTX3090"), True), (("RTX3090", "RTX3060"), False)]
)
def test_requested_layers_get_a_plan_over_both(cards: tuple[str, ...], has_controlnet: bool) -> None:
    components = component_costs("sdxl", 1024, 1024, has_controlnet=has_controlnet)
    job = JobShape(components=components)
    plan = make_plan(profile_model("sdxl", 1024, 1024), card_slots(cards), card_links(cards, "host"), job, strategy="layers")
    assert plan.strategy == "layers"
    assert set(plan.used_slots) == {0, 1}
    assert set(plan.component_slots) == {component.name for component in components}
