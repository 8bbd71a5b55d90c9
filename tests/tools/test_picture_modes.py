"""A few cases of docs/picture_modes.md, and the counting functions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tools.demo_model.product import installed_product
from tools.demo_model.scenes import draw_scene
from tools.picture_modes import (
    HIRES_MODES,
    INPAINT_MODES,
    REPORT_FILE,
    SHEET_FILE,
    Counts,
    InpaintMode,
    count_hires,
    count_img2img,
    count_inpainting,
    count_only_masked,
    count_table,
    draw_changes,
    draw_corner_cases,
    draw_hires_cases,
    draw_replacements,
    is_untouched,
    mask_of_first,
    must_stay,
)


@pytest.fixture(scope="module")
def product() -> Iterator[None]:
    with installed_product():
        yield


@pytest.mark.usefixtures("product")
def test_img2img_keeps_the_picture_at_no_strength_and_follows_the_prompt_at_full() -> None:
    weak, strong = count_img2img(draw_changes(2), (0.0, 1.0))[0]
    assert weak.right["start's object"] == 2
    assert strong.right["prompt's object"] == strong.right["prompt's background"] == 2


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("mode", INPAINT_MODES[:2], ids=lambda mode: mode.label)
def test_inpainting_changes_what_is_masked_and_nothing_else(mode: InpaintMode) -> None:
    counts, pictures = count_inpainting(draw_replacements(2), mode)
    assert counts.right["outside bit-equal"] == counts.right["its neighbour"] == counts.right["inside changed"] == 2
    assert counts.right["prompt's object"] == 2
    assert [picture.size for picture in pictures] == [(64, 64)] * 2


@pytest.mark.usefixtures("product")
def test_only_masked_makes_the_quarter_and_nothing_else() -> None:
    counts, _ = count_only_masked(draw_corner_cases(2))
    assert counts.right == {"prompt's object": 2, "its neighbour": 2, "outside bit-equal": 2, "inside changed": 2}


@pytest.mark.usefixtures("product")
def test_hires_fix_doubles_the_side_and_keeps_colour_and_background() -> None:
    modes = dict(HIRES_MODES)
    counts, pictures = count_hires(draw_hires_cases(2), "", modes["Lanczos, strength 0.1"])
    assert [picture.size for picture in pictures] == [(128, 128)] * 2
    assert counts.right["colour"] == counts.right["background"] == 2
    assert counts.right["object"] >= 1


def test_what_must_stay_ends_where_the_blur_does() -> None:
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (30, 8, 40, 12))
    assert np.array_equal(must_stay(mask, 0), np.asarray(mask) == 0)
    stays = must_stay(mask, 2)  # reaches 5 pixels
    assert not stays[8, 25] and stays[8, 24]
    assert not stays[3, 35] and stays[2, 35]
    assert not stays[16, 35] and stays[17, 35]
    assert stays[:, 0].all(), "nothing comes round the edge"


def test_one_level_outside_is_noticed() -> None:
    change = draw_replacements(1)[0]
    start, where = draw_scene(change.before), must_stay(mask_of_first(change.before), 4)
    touched = np.array(start)
    assert is_untouched(start, Image.fromarray(touched), where)
    row, column = np.argwhere(where)[0]
    touched[row, column, 0] ^= 1
    assert not is_untouched(start, Image.fromarray(touched), where)
    assert 0.3 < where.mean() < 0.6


def test_cases_are_what_they_say() -> None:
    for change in draw_changes(10):
        assert change.before.things[0].cell == change.after.things[0].cell
        assert change.before.background != change.after.background
    for change in draw_replacements(10):
        assert change.before.things[1] == change.after.things[1]
        assert change.before.things[0].colour != change.after.things[0].colour
        mask = np.asarray(mask_of_first(change.before))
        first, second = (change.before.things[index].cell[0] for index in (0, 1))
        assert mask[:, 0 if first < second else -1].all() and not mask[:, -1 if first < second else 0].any()


def test_tables_name_their_columns() -> None:
    counts, _ = count_img2img([], ())
    assert counts == []
    assert SHEET_FILE.stat().st_size < 300_000
    assert count_table([Counts("a", 2, {"x": 1, "y": 2})]) == ["| | pictures | x | y |", "|---|---|---|---|", "| a | 2 | 1 | 2 |"]
    assert REPORT_FILE.read_text(encoding="utf-8").count("| 25 |") > 20
