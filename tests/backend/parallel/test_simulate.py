from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from backend.parallel.planning import planner
from backend.parallel.planning.simulation import (
    SimulatedJob,
    SimulationError,
    card_links,
    card_names,
    find_card,
    parse_cards,
    parse_picture_size,
    simulate,
)
from backend.parallel.planning.validation import measured_tiles, published_comparisons, tile_comparisons, validation_tables
from backend.parallel.simulate import main
from tests.contract.sources import ROOT_DIR

TOLERANCE = 0.06
FAR_OFF = "2xArcA770"
"""The one published figure that is not met: "about 1.7x" under Windows, where prediction has no account of the driver's cost."""


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_predictions_meet_published_figures() -> None:
    rows = published_comparisons()
    assert len(rows) >= 5
    for row in rows:
        assert abs(row.error) <= (0.18 if row.what.startswith(FAR_OFF) else TOLERANCE), row


def test_predictions_of_tiles_meet_the_study() -> None:
    study = tuple(tile_comparisons())
    assert len(study) == 16
    assert all(abs(row.error) <= 0.05 for row in study), study


def test_predictions_of_tiles_meet_what_others_measured() -> None:
    """Ulysses on four cards moves half of the bytes that are predicted."""
    rows = tuple(measured_tiles())
    assert len(rows) == 23
    (far,) = [row for row in rows if abs(row.error) > 0.15]
    assert far.what.startswith("4xL20") and "Ulysses" in far.what and far.error > -0.2


def test_large_pictures_on_four_cards() -> None:
    """What issues promise of one 2048x2048 SDXL picture with CFG: 3.4x on A100s with NVLink; through host memory, what is true."""
    speedups = {}
    for card, link in (("A100-80", "nvlink"), ("RTX4090", "host")):
        plan = simulate(SimulatedJob(cards=(card,) * 4, width_px=2048, height_px=2048, link=link)).plan
        assert plan.strategy == "tiles" and [len(team.slots) for team in plan.tiles] == [2, 2]
        speedups[card] = plan.predicted_speedup
    assert speedups["A100-80"] >= 3.4
    assert 2.4 < speedups["RTX4090"] < 2.8


def test_the_document_contains_the_output_of_the_command() -> None:
    document = (ROOT_DIR / "docs" / "simulate.md").read_text(encoding="utf-8")
    for line in validation_tables().splitlines():
        assert line in document, f"docs/simulate.md misses {line!r}; paste the output of: python -m backend.parallel.simulate --validate"


def test_what_was_reported_slower_with_two_cards_stays_on_one() -> None:
    """ComfyUI PR #7063: SD 1.5 at 512x512 on two RTX 4090 is slower than on one."""
    plan = simulate(SimulatedJob(cards=("RTX4090", "RTX4090"), model="sd15", width_px=512, height_px=512)).plan
    assert plan.strategy == "single"


def test_the_command_prints_plan_time_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, "--gpus", "2xRTX3090,1xRTX4090", "--model", "sdxl", "--size", "2048x2048", "--batch", "4")
    assert "SDXL UNet, 2048x2048, 4 image(s), CFG" in printed
    assert "plan: " in printed and "ms predicted" in printed and "VAE decode" in printed
    assert all(f"slot {index} {name}:" in printed for index, name in enumerate(("RTX3090", "RTX3090", "RTX4090")))


def test_a_card_may_be_given_less_memory() -> None:
    assert parse_cards("2xRTX3060:6,RTX4090") == ("RTX3060:6", "RTX3060:6", "RTX4090")
    card = find_card("rtx 3060:6.5")
    assert (card.memory_gib, card.effective_tflops) == (6.5, find_card("RTX3060").effective_tflops)
    for wrong in ("RTX3060:13", "RTX3060:1", "RTX3060:", "RTX3060:x", "RTX3060:nan"):
        with pytest.raises(SimulationError, match="give a number above 1 and up to its 12"):
            find_card(wrong)


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backend.parallel.simulate", "--gpus", "2xNope"],
        cwd=ROOT_DIR,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "'Nope'" in done.stderr and "RTX3090" in done.stderr


def test_cfg_of_one_is_one_branch(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CFG" in output_of(capsys, "--gpus", "2xRTX3090", "--cfg", "1")


def test_small_cards_share_one_copy_with_a_controlnet(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, "--gpus", "2xRTX3070", "--controlnet", "--batch", "2")
    assert "plan: layers" in printed and "no single card holds it" in printed and "lanes 2" in printed and "ControlNet" in printed


def test_strategy_and_link_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, "--gpus", "2xRTX3090", "--strategy", "layers", "--link", "nvlink")
    assert "layers was requested" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2xRTX3090", "--model", "flux"], "--model 'flux' is unknown. Known models: sd15, sd21, sdxl"),
        (["--gpus", "2xRTX3090", "--size", "big"], "--size 'big'"),
        (["--gpus", "0xRTX3090"], "--gpus '0xRTX3090'"),
        (["--gpus", "RTX3090,"], "'' does not name a card"),
        (["--gpus", "RTX3090", "--link", "wifi"], "--link 'wifi' is unknown. Known links: host, pcie, nvlink"),
        (["--gpus", "RTX3090", "--batch", "0"], "--batch 0"),
        ([], "No cards were given"),
    ],
)
def test_what_is_not_known_is_said(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_cards_are_found_however_they_are_spelt() -> None:
    assert find_card("GeForce RTX 3090").name == find_card("rtx-3090").name == "RTX3090"
    assert parse_cards("2xRTX3090, rtx4090") == ("RTX3090", "RTX3090", "RTX4090")
    with pytest.raises(SimulationError, match="Known cards: RTX2080Ti"):
        find_card("Voodoo2")


def test_every_card_has_sensible_figures() -> None:
    assert len(card_names()) >= 25
    for name in card_names():
        card = find_card(name)
        assert 4 <= card.memory_gib <= 200 and 5 < card.effective_tflops < 500 and 100 < card.bandwidth_gb_s < 10_000 and card.basis


def test_sizes() -> None:
    assert parse_picture_size("2048x1024") == (2048, 1024)
    with pytest.raises(SimulationError):
        parse_picture_size("32x32")


def test_two_cards_are_linked_by_the_slower_kind_they_have() -> None:
    host, nvlink = card_links(("RTX3090", "A100-80")), card_links(("A100-80", "A100-80"))
    assert {link.bytes_per_ms for link in host} == {10e6}
    assert {link.bytes_per_ms for link in nvlink} == {240e6}
    assert {link.bytes_per_ms for link in card_links(("RTX3090", "RTX3090"), "pcie")} == {25e6}


def test_mixed_cards_are_predicted_within_their_sum() -> None:
    plan = simulate(SimulatedJob(cards=("RTX3090", "RTX4090"), images=4)).plan
    assert 1.3 < plan.predicted_speedup < 1 + find_card("RTX3090").effective_tflops / find_card("RTX4090").effective_tflops + 0.01
    assert math.isfinite(plan.predicted_ms)


def test_eight_cards_are_answered_without_searching_cuts_that_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of all slots share one interpreter, so a cut of eight rows cannot beat eight copies. Searching for one took minutes."""
    searched, search = [], planner.partition

    def note(*args: Any, **kwargs: Any) -> Any:
        searched.append(args)
        return search(*args, **kwargs)

    monkeypatch.setattr(planner, "partition", note)
    plan = simulate(SimulatedJob(cards=("RTX4090",) * 8, model="sdxl", images=4)).plan
    assert plan.strategy == "replicas"
    assert searched == []
