"""A step on one slot against divided steps, and the slots' budgets after shortages. Reference: counted by hand."""

from __future__ import annotations

import pytest
import torch

from backend.parallel.running.slot_budgets import SlotBudgets
from backend.parallel.running.step_trial import StepTrial
from tests.support.fleets import cpu_fleet


@pytest.mark.parametrize(
    ("step_ms", "pays"), [((90.0, 60.0, 50.0, 61.0), False), ((90.0, 60.0, 100.0, 70.0), True), ((90.0, 60.0, 62.0, 60.0), False)]
)
def test_the_third_step_is_compared_with_the_steps_around_it(step_ms: tuple[float, ...], pays: bool) -> None:
    with cpu_fleet(2) as fleet:
        trial = StepTrial(fleet, "a model at a size")
        for number, one_ms in enumerate(step_ms):
            assert trial.is_alone(number) is (number == 2)
            assert not trial.judge()
            trial.note(one_ms)
        assert trial.judge() is not pays
        assert trial.is_known
        assert (trial.without_gain is None) is pays
        assert not trial.judge()  # once
        assert StepTrial(fleet, "a model at a size").is_known
        assert not StepTrial(fleet, "another size").is_known


def test_where_one_slot_has_no_room_dividing_pays() -> None:
    with cpu_fleet(2) as fleet:
        trial = StepTrial(fleet, "large")
        trial.give_up()
        assert trial.is_known
        assert trial.without_gain is None


def test_a_slot_gets_less_after_each_shortage_and_in_the_end_nothing() -> None:
    budgets, device = SlotBudgets(), torch.device("cpu")
    assert budgets.is_first_shortage(1)
    assert budgets.share_of(1) == 1.0
    shares = []
    for _ in range(5):
        assert not budgets.is_first_shortage(1)
        budgets.give_less(1, device)
        shares.append(budgets.share_of(1))
    assert shares == pytest.approx([0.75, 0.75**2, 0.75**3, 0.0, 0.0])
    assert budgets.share_of(0) == 1.0
