"""Compares predictions with figures that others published or computed. `python -m backend.parallel.simulate --validate` prints the tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from backend.parallel.planning.candidate import JobShape, deal_by_speed
from backend.parallel.planning.costs import ModelProfile
from backend.parallel.planning.pipeline import StageTime, StepRows, simulate_pipeline
from backend.parallel.planning.planner import make_plan
from backend.parallel.planning.simulation import (
    DATA_DIR,
    SimulatedJob,
    card_links,
    card_slots,
    component_costs,
    model_config,
    parse_cards,
    parse_picture_size,
    profile_model,
    simulate,
)
from backend.parallel.planning.slot_facts import Link, LinkTable, SlotFacts
from backend.parallel.planning.tile_costs import TileCosts

KERNEL_FLOOR_MS = 0.01
"""Time of one operation of a forward on a card, however small the tile. Fitted to DistriFusion's nine rows: their times on 1 to 8 cards have a part
of about 26 ms a step that does not shrink."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A speedup as we predict it and as others give it. `expected_to` is the upper end if theirs is a range."""

    what: str
    predicted: float
    expected: float
    expected_to: float | None = None

    @property
    def error(self) -> float:
        """Relative error of our prediction; 0 within a range."""
        nearest = min(max(self.predicted, self.expected), self.expected_to or self.expected)
        return self.predicted / nearest - 1.0


def published_comparisons() -> tuple[Comparison, ...]:
    """Speedups that others measured on two cards."""
    rows = json.loads((DATA_DIR / "published.json").read_text(encoding="utf-8"))
    return tuple(_compare_published(row) for row in rows)


def _compare_published(row: dict[str, str | int | float]) -> Comparison:
    width_px, height_px = parse_picture_size(str(row["size"]))
    cards, images = parse_cards(str(row["gpus"])), int(row["batch"])
    job = SimulatedJob(cards=cards, model=str(row["model"]), width_px=width_px, height_px=height_px, images=images, strategy="replicas")
    predicted = simulate(job).plan.predicted_speedup
    return Comparison(what=f"{row['gpus']}, {row['model']}, {row['size']}: {row['source']}", predicted=predicted, expected=float(row["speedup"]))


def study_comparisons() -> tuple[Comparison, ...]:
    """Speedups that a study of the field computed for slots without transfer times: pipelines and dealt rows."""
    return (*_pipelines(), *_deals())


def _pipelines() -> Iterator[Comparison]:
    straight, u_cut = ((0, 50.0), (1, 50.0)), ((0, 22.0), (1, 46.0), (0, 32.0))
    even = tuple((slot, 25.0) for slot in range(4))
    at_segments = ((0, 31.6), (1, 23.2), (2, 24.4), (3, 20.8))  # SDXL's most even straight cut between segments
    rows = (
        ("straight cut, 1 image with CFG", straight, 1, 1.33, None),
        ("U-cut (46 % inside), 1 image with CFG", u_cut, 1, 1.37, None),
        ("U-cut, 2 images with CFG in lanes", u_cut, 2, 1.76, 1.85),
        ("U-cut, 4 images with CFG in lanes", u_cut, 4, 1.85, 1.98),
        ("even straight cut, 4 slots, 1 image with CFG", even, 1, 1.60, None),
        ("straight cut between segments, 4 slots, 2 images with CFG in lanes", at_segments, 2, 3.15, None),
        ("straight cut between segments, 4 slots, 4 images with CFG in lanes", at_segments, 4, 3.20, None),
    )
    for what, runs, images, expected, expected_to in rows:
        stages = [StageTime(slot=slot, run_ms=run_ms) for slot, run_ms in runs]
        step_ms = simulate_pipeline(stages, StepRows(images=images, branches=2)).step_ms
        yield Comparison(what=what, predicted=2 * images * 100.0 / step_ms, expected=expected, expected_to=expected_to)


def _deals() -> Iterator[Comparison]:
    for num_rows, speeds, expected in (
        (2, (1.0, 0.6), 1.20),
        (3, (1.0, 0.6), 1.50),
        (4, (1.0, 0.6), 1.33),
        (8, (1.0, 0.6), 1.60),
        (2, (1.0, 0.4), 1.00),
    ):
        dealt = deal_by_speed(num_rows, speeds)
        predicted = num_rows / max(rows / speed for rows, speed in zip(dealt, speeds))
        yield Comparison(what=f"{num_rows} rows on slots of speed {speeds[0]} and {speeds[1]}", predicted=predicted, expected=expected)


def tile_comparisons() -> Iterator[Comparison]:
    """Speedups of exact tiles for one SDXL image with CFG, which the study computed for cards without launch times."""
    for card, link, expected in (
        ("RTX3090", "pcie", {2: (1.62, 1.75), 4: (3.06, 3.40)}),
        ("RTX3090", "host", {2: (1.42, 1.57), 4: (2.67, 3.04)}),
        ("RTX4090", "host", {2: (1.11, 1.27), 4: (2.07, 2.46)}),
        ("A100-80", "nvlink", {2: (1.69, 1.84), 4: (3.16, 3.56)}),
    ):
        for count, by_size in expected.items():
            for side_px, speedup in zip((1024, 2048), by_size):
                yield Comparison(
                    what=f"{count}x{card}, {link}, {side_px}x{side_px}", predicted=_predict_tiles(card, count, link, side_px), expected=speedup
                )


def _predict_tiles(card: str, count: int, link: str, side_px: int) -> float:
    names, profile = (card,) * count, profile_model("sdxl", side_px, side_px)
    slots = [replace(slot, kernel_ms=0.0) for slot in card_slots(names)]
    return make_plan(profile, slots, card_links(names, link), JobShape(), strategy="tiles").predicted_speedup


def measured_tiles() -> Iterator[Comparison]:
    """Speedups of tiles and of sequence parallel over one card of the same kind, which others measured, mostly of whole requests.

    The speed of one card is taken from the row itself. The VAE decodes on one card. Each card has a process of its own, so launches do not add up,
    but a UNet's forward takes at least KERNEL_FLOOR_MS for each operation, however small the tile. A DiT has few large matrix products instead.
    """
    for study in json.loads((DATA_DIR / "published_tiles.json").read_text(encoding="utf-8")):
        for size, (alone_s, times_s) in study["rows"].items():
            for count, together_s in times_s.items():
                what = f"{count}x{study['cards']}, {study['model']}, {size}: {study['source']}, {alone_s:g} -> {together_s:g} s"
                yield Comparison(what=what, predicted=_predict_measured(study, size, int(count), 1000.0 * alone_s), expected=alone_s / together_s)


def _predict_measured(study: Mapping[str, Any], size: str, count: int, alone_ms: float) -> float:
    (width_px, height_px), names, branches, steps = parse_picture_size(size), (study["cards"],) * count, study["branches"], study["steps"]
    profile = profile_model(study["model"], width_px, height_px)
    vae = component_costs(study["model"], width_px, height_px, has_controlnet=False)[1] if study.get("has_vae") else None
    vae_work = 0.0 if vae is None else vae.flops_per_row
    slots = card_slots(names)
    floor_ms = 0.0 if "family" in model_config(study["model"]) else KERNEL_FLOOR_MS * profile.num_kernels
    fixed_ms = steps * (profile.weight_bytes / slots[0].memory_bytes_per_ms + floor_ms)
    speed = (steps * branches * profile.work_per_row + vae_work) / (alone_ms - fixed_ms)
    slots = tuple(replace(slot, speed=speed, kernel_ms=0.0) for slot in slots)
    job = JobShape(branches=branches, exact_share=study.get("exact_steps", steps) / steps)
    step_ms = _team_step_ms(profile, slots, card_links(names, study["link"]), job, one_team=bool(study.get("team")))
    return float(alone_ms / (steps * (step_ms + floor_ms) + vae_work / speed))


def _team_step_ms(profile: ModelProfile, slots: Sequence[SlotFacts], links: Sequence[Link], job: JobShape, *, one_team: bool) -> float:
    """A step of all rows on one team, or on as many equal teams as there are rows and slots for."""
    assert profile.tiles is not None
    costs = TileCosts(profile, profile.tiles, LinkTable(links), job, tuple(slots))
    num_teams = 1 if one_team else min(job.num_rows, len(slots) // 2)
    teams = [tuple(slots[place::num_teams]) for place in range(num_teams)]
    return max(costs.team_ms(team, costs.plan_team(team), job.num_rows // num_teams) for team in teams)


def validation_tables() -> str:
    """The tables as Markdown."""
    return "\n".join(
        [
            *_table("published (measured)", published_comparisons()),
            "",
            *_table("study (computed)", study_comparisons()),
            "",
            *_table("exact tiles", tuple(tile_comparisons())),
            "",
            *_table("tiles (measured)", tuple(measured_tiles())),
        ]
    )


def _table(title: str, rows: tuple[Comparison, ...]) -> Iterator[str]:
    yield f"| case | predicted | {title} | error |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        expected = f"{row.expected:.2f}" if row.expected_to is None else f"{row.expected:.2f}..{row.expected_to:.2f}"
        yield f"| {row.what} | {row.predicted:.2f} | {expected} | {100 * row.error:+.1f} % |"
