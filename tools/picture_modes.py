"""`python -m tools.picture_modes`: img2img, inpainting and hires fix with the product and the demo checkpoint, evaluated by its judge.

Writes the measured part of docs/picture_modes.md and the sheet docs/images/picture_modes.png. This tool samples nothing itself: every picture is a
job of the product, Euler a, 20 steps, CFG 5.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from tools.demo_model.evaluate import make_contact_sheet, score_verdict
from tools.demo_model.judge import judge_picture
from tools.demo_model.networks import SIDE_PX
from tools.demo_model.product import DEMO_CHECKPOINT, installed_product, make_picture_from, make_text_picture
from tools.demo_model.scenes import COLOURS, SHAPES, Scene, Thing, describe_scene, draw_scene, sample_scene, thing_box
from tools.documents import write_measured

DOCS = Path(__file__).resolve().parents[1] / "docs"
REPORT_FILE, SHEET_FILE = DOCS / "picture_modes.md", DOCS / "images" / "picture_modes.png"
STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
SHEET_ROWS = 8
BLUR_REACH = 2.5  # times the mask blur's radius; the kernel is 0 beyond that


@dataclass(frozen=True, slots=True)
class Change:
    """An existing picture, and what a prompt wants in its place."""

    before: Scene
    after: Scene
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True)
class Counts:
    """One row of the report: a label, and how many of `total` were right by each criterion."""

    label: str
    total: int
    right: dict[str, int]


# img2img


def draw_changes(num_cases: int, *, seed: int = 5) -> list[Change]:
    """Pairs of one-object scenes at the same place with different color, shape and background; the prompt describes the second."""
    rng, changes = random.Random(seed), list[Change]()
    while len(changes) < num_cases:
        before, after = (sample_scene(rng, two_things_share=0.0) for _ in range(2))
        first, second = before.things[0], after.things[0]
        if first.colour == second.colour or first.shape == second.shape or before.background == after.background:
            continue
        before = replace(before, things=(replace(first, extent="large"),))
        after = replace(after, things=(replace(second, extent="large", cell=first.cell),))
        changes.append(Change(before, after, describe_scene(after, rng, full=True), len(changes) + 1))
    return changes


def count_img2img(changes: Sequence[Change], strengths: Sequence[float] = STRENGTHS) -> tuple[list[Counts], list[Image.Image]]:
    """By strength: how many pictures still show the start's object, and how many the prompt's; and the pictures, one row per case."""
    rows: list[Counts] = []
    starts = [draw_scene(change.before) for change in changes]
    pictures = [[start] for start in starts]
    for strength in strengths:
        made = [make_picture_from(start, c.prompt, seed=c.seed, denoising_strength=strength) for start, c in zip(starts, changes)]
        old = [score_verdict(c.before, judge_picture(picture)) for c, picture in zip(changes, made)]
        new = [score_verdict(c.after, judge_picture(picture)) for c, picture in zip(changes, made)]
        right = {
            "mean difference, levels": round(float(np.mean([_mean_difference(start, picture) for start, picture in zip(starts, made)]))),
            "start's shape": sum(score.shape for score in old),
            "start's object": sum(score.objects for score in old),
            "prompt's object": sum(score.objects for score in new),
            "prompt's background": sum(score.background for score in new),
        }
        rows.append(Counts(f"strength {strength}", len(changes), right))
        for row, picture in zip(pictures, made):
            row.append(picture)
    return rows, [picture for row in pictures[:SHEET_ROWS] for picture in row]


def keep_scenes(changes: Sequence[Change], *, seed: int = 5) -> list[Change]:
    """The same starts, with prompts that describe what they already show."""
    rng = random.Random(seed)
    return [replace(change, after=change.before, prompt=describe_scene(change.before, rng, full=True)) for change in changes]


def _mean_difference(start: Image.Image, picture: Image.Image) -> float:
    return float(np.asarray(ImageChops.difference(start, picture)).mean())


# Inpainting


@dataclass(frozen=True, kw_only=True, slots=True)
class InpaintMode:
    """Settings of one way to inpaint."""

    label: str
    fields: dict[str, Any]


INPAINT_MODES = (
    InpaintMode(label="whole picture, fill, blur 4", fields={"inpainting_fill": 0, "mask_blur": 4, "inpaint_full_res": False}),
    InpaintMode(label="whole picture, fill, blur 0", fields={"inpainting_fill": 0, "mask_blur": 0, "inpaint_full_res": False}),
    InpaintMode(label="whole picture, original, blur 4", fields={"inpainting_fill": 1, "mask_blur": 4, "inpaint_full_res": False}),
    InpaintMode(label="whole picture, latent noise, blur 4", fields={"inpainting_fill": 2, "mask_blur": 4, "inpaint_full_res": False}),
    InpaintMode(label="whole picture, latent nothing, blur 4", fields={"inpainting_fill": 3, "mask_blur": 4, "inpaint_full_res": False}),
)
ONLY_MASKED = InpaintMode(label="only masked, fill, blur 0, padding 0", fields={"inpainting_fill": 0, "mask_blur": 0, "inpaint_full_res": True})


def draw_replacements(num_cases: int, *, seed: int = 6) -> list[Change]:
    """Two-object scenes (left of, right of), and the same scenes with a different first object."""
    rng, changes = random.Random(seed), list[Change]()
    while len(changes) < num_cases:
        before = sample_scene(rng, two_things_share=1.0)
        first, second = (replace(thing, extent="large") for thing in before.things)
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if before.relation not in ("left of", "right of") or first.colour == second.colour or colour in (first.colour, second.colour):
            continue
        before = replace(before, things=(first, second))
        after = replace(before, things=(replace(first, colour=colour, shape=shape), second))
        changes.append(Change(before, after, describe_scene(after, rng, full=True), len(changes) + 1))
    return changes


def mask_of_first(scene: Scene) -> Image.Image:
    """White over the half of the picture with the first object, extending four pixels beyond its edges."""
    thing = scene.things[0]
    x, _, half = thing_box(thing, (scene.jitter[0], scene.jitter[1]), SIDE_PX)
    left, right = (0, min(SIDE_PX // 2, round(x + half) + 4)) if x < SIDE_PX / 2 else (max(SIDE_PX // 2, round(x - half) - 4), SIDE_PX)
    mask = Image.new("L", (SIDE_PX, SIDE_PX), 0)
    mask.paste(255, (left, 0, right, SIDE_PX))
    return mask


def must_stay(mask: Image.Image, blur_px: int) -> np.ndarray:
    """Where the picture may not change: farther from the mask than the blur reaches (rows and columns separately)."""
    reach = int(BLUR_REACH * blur_px + 0.5)
    near = np.asarray(mask) > 0
    for axis in (0, 1):
        shifted = [np.roll(near, shift, axis) & _not_wrapped(near.shape, shift, axis) for shift in range(-reach, reach + 1)]
        near = np.logical_or.reduce(shifted)
    return ~near


def _not_wrapped(shape: tuple[int, ...], shift: int, axis: int) -> np.ndarray:
    places = np.arange(shape[axis])
    kept = (places - shift >= 0) & (places - shift < shape[axis])
    return kept[:, None] if axis == 0 else kept[None, :]


def count_inpainting(changes: Sequence[Change], mode: InpaintMode) -> tuple[Counts, list[Image.Image]]:
    """How many masked objects became the prompt's, how many neighbors are still there, how many pictures are unchanged outside the mask."""
    right, made = {"prompt's object": 0, "its neighbour": 0, "outside bit-equal": 0, "inside changed": 0}, list[Image.Image]()
    for change in changes:
        start, mask = draw_scene(change.before), mask_of_first(change.before)
        picture = make_picture_from(start, change.prompt, seed=change.seed, mask=mask, denoising_strength=1.0, **mode.fields)
        right["prompt's object"] += _shows(picture, change.after.things[0])
        right["its neighbour"] += _shows(picture, change.after.things[1])
        right["outside bit-equal"] += is_untouched(start, picture, must_stay(mask, mode.fields["mask_blur"]))
        right["inside changed"] += _differs_inside(start, picture, mask)
        made.append(picture)
    return Counts(mode.label, len(changes), right), made


def _shows(picture: Image.Image, thing: Thing) -> bool:
    return any((found.colour, found.shape) == (thing.colour, thing.shape) for found in judge_picture(picture).findings)


def is_untouched(start: Image.Image, picture: Image.Image, where_HW: np.ndarray) -> bool:
    """Whether no pixel differs there by even one level."""
    return bool(np.array_equal(np.asarray(start)[where_HW], np.asarray(picture)[where_HW]))


def _differs_inside(start: Image.Image, picture: Image.Image, mask: Image.Image) -> bool:
    change = np.asarray(ImageChops.difference(start, picture)).max(axis=-1)[np.asarray(mask) > 0]
    return bool((change > 24).mean() > 0.1)


def draw_corner_cases(num_cases: int, *, seed: int = 7) -> list[Change]:
    """A 128x128 picture with one object in its top left quarter; the prompt wants another object in the center of the bottom right quarter."""
    rng, changes = random.Random(seed), list[Change]()
    while len(changes) < num_cases:
        before = sample_scene(rng, two_things_share=0.0)
        first = replace(before.things[0], extent="medium", cell=(0, 0))
        wanted = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), "large", (1, 1))
        if wanted.colour == first.colour:
            continue
        before = replace(before, things=(first,))
        after = replace(before, things=(wanted,))
        changes.append(Change(before, after, describe_scene(after, rng, full=True), len(changes) + 1))
    return changes


def count_only_masked(changes: Sequence[Change], mode: InpaintMode = ONLY_MASKED) -> tuple[Counts, list[Image.Image]]:
    """A quarter of a picture of twice the side length, made at the model's native size and pasted back."""
    side_px = 2 * SIDE_PX
    mask = Image.new("L", (side_px, side_px), 0)
    mask.paste(255, (SIDE_PX, SIDE_PX, side_px, side_px))
    right, made = {"prompt's object": 0, "its neighbour": 0, "outside bit-equal": 0, "inside changed": 0}, list[Image.Image]()
    for change in changes:
        start = draw_scene(change.before, side_px)
        picture = make_picture_from(start, change.prompt, seed=change.seed, mask=mask, denoising_strength=1.0, **mode.fields)
        right["prompt's object"] += _shows(picture, change.after.things[0])
        right["its neighbour"] += _shows(picture, change.before.things[0])
        right["outside bit-equal"] += is_untouched(start, picture, must_stay(mask, mode.fields["mask_blur"]))
        right["inside changed"] += _differs_inside(start, picture, mask)
        made.append(picture)
    return Counts(mode.label, len(changes), right), made


# Hires fix

HIRES_MODES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("no hires fix: 64x64", {}),
    ("no hires fix: 128x128 at once", {"width": 2 * SIDE_PX, "height": 2 * SIDE_PX}),
    ("Lanczos, strength 0.1", {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Lanczos", "denoising_strength": 0.1}),
    ("Lanczos, strength 0.2", {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Lanczos", "denoising_strength": 0.2}),
    ("Lanczos, strength 0.3", {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Lanczos", "denoising_strength": 0.3}),
    ("Lanczos, strength 0.5", {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Lanczos", "denoising_strength": 0.5}),
    ("Latent, strength 0.5", {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.5}),
    ("Latent, strength 0.7", {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "denoising_strength": 0.7}),
)


def draw_hires_cases(num_cases: int, *, seed: int = 8) -> list[Change]:
    """One large object each; before and after are the same scene."""
    rng, changes = random.Random(seed), list[Change]()
    for index in range(num_cases):
        scene = sample_scene(rng, two_things_share=0.0)
        scene = replace(scene, things=(replace(scene.things[0], extent="large"),))
        changes.append(Change(scene, scene, describe_scene(scene, rng, full=True), index + 1))
    return changes


def count_hires(changes: Sequence[Change], label: str, fields: dict[str, Any]) -> tuple[Counts, list[Image.Image]]:
    """How many pictures have the prompt's color, shape, object (one and no other) at its place, and background."""
    made = [make_text_picture(c.prompt, seed=c.seed, hr_cfg=5.0, **fields) for c in changes]
    scores = [score_verdict(c.after, judge_picture(picture)) for c, picture in zip(changes, made)]
    fields_of_score = {"colour": "colour", "shape": "shape", "object": "objects", "place": "place", "background": "background"}
    return Counts(label, len(changes), {name: sum(getattr(s, field) for s in scores) for name, field in fields_of_score.items()}), made


# Report


def count_table(rows: Sequence[Counts]) -> list[str]:
    names = list(rows[0].right)
    lines = [f"| | pictures | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    return lines + [f"| {row.label} | {row.total} | {' | '.join(str(row.right[name]) for name in names)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.picture_modes", description=__doc__)
    parser.add_argument("--cases", type=int, default=25)
    parser.add_argument("--out", type=Path, default=REPORT_FILE)
    parser.add_argument("--sheet", type=Path, default=SHEET_FILE)
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    args = parser.parse_args()
    with installed_product(args.checkpoint):
        lines, sheets = measure(args.cases)
    write_measured(args.out, lines, command="tools.picture_modes")
    lay_sheets(sheets).quantize(96).save(args.sheet, optimize=True)


def measure(num_cases: int) -> tuple[list[str], list[Image.Image]]:
    """The report's lines, and a sheet of pictures for each part."""
    changes, replacements, corners, hires = (draw(num_cases) for draw in (draw_changes, draw_replacements, draw_corner_cases, draw_hires_cases))
    img2img_rows, img2img_sheet = count_img2img(changes)
    kept_rows, _ = count_img2img(keep_scenes(changes))
    inpainting = [count_inpainting(replacements, mode) for mode in INPAINT_MODES] + [count_only_masked(corners)]
    scaled = [count_hires(hires, label, fields) for label, fields in HIRES_MODES]
    lines = ["### img2img, the prompt wants another object on another background", "", *count_table(img2img_rows)]
    lines += [
        "",
        "### img2img, the prompt says what is there",
        "",
        *count_table(kept_rows),
        "",
        "### Inpainting",
        "",
        *count_table([row for row, _ in inpainting]),
    ]
    lines += ["", "### Hires fix", "", *count_table([row for row, _ in scaled])]
    shown = range(min(SHEET_ROWS, num_cases))
    by_mode = [pictures for _, pictures in inpainting[:-1]]
    inpaint_rows = [picture for index in shown for picture in (draw_scene(replacements[index].before), *(made[index] for made in by_mode))]
    corner_rows = [picture for index in shown for picture in (draw_scene(corners[index].before, 2 * SIDE_PX), inpainting[-1][1][index])]
    hires_rows = [made[index].resize((2 * SIDE_PX,) * 2, Image.Resampling.NEAREST) for index in shown for _, made in scaled]
    sheets = [
        make_contact_sheet(img2img_sheet, columns=1 + len(STRENGTHS)),
        make_contact_sheet(inpaint_rows, columns=1 + len(by_mode)),
        make_contact_sheet(corner_rows, columns=2),
        make_contact_sheet(hires_rows, columns=len(scaled)),
    ]
    return lines, sheets


def lay_sheets(sheets: Sequence[Image.Image], *, gap_px: int = 8) -> Image.Image:
    """The sheets side by side at equal height."""
    height_px = SHEET_ROWS * SIDE_PX
    fitted = [sheet.resize((round(sheet.width * height_px / sheet.height), height_px), Image.Resampling.BOX) for sheet in sheets]
    whole = Image.new("RGB", (sum(sheet.width for sheet in fitted) + gap_px * (len(fitted) - 1), height_px), "white")
    x = 0
    for sheet in fitted:
        whole.paste(sheet, (x, 0))
        x += sheet.width + gap_px
    return whole


if __name__ == "__main__":
    main()
