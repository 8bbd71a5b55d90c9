from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modules.pictures.grids import (
    MAX_LABEL_LINES,
    GridAnnotation,
    LabelStyle,
    choose_num_rows,
    combine_grid,
    draw_labels,
    lay_grid,
    prompt_matrix_labels,
    split_grid,
    wrap_text,
)


@pytest.mark.parametrize(
    ("num_images", "wanted", "batch_size", "full", "rows"),
    [
        (4, -1, 1, False, 2),
        (5, -1, 1, False, 2),
        (7, -1, 1, False, 3),
        (6, 0, 2, False, 2),
        (6, 3, 1, False, 3),
        (6, -1, 1, True, 2),
        (7, -1, 1, True, 1),
        (2, 9, 1, False, 2),
        (1, 0, 8, False, 1),
    ],
)
def test_rows(num_images: int, wanted: int, batch_size: int, full: bool, rows: int) -> None:
    assert choose_num_rows(num_images, wanted_rows=wanted, batch_size=batch_size, prevent_empty_spots=full) == rows


def test_pictures_lie_row_by_row_centred() -> None:
    grid = lay_grid([Image.new("RGB", (10, 10), "red"), Image.new("RGB", (6, 6), "blue"), Image.new("RGB", (10, 10), "lime")], 2, 2, "white")
    assert grid.size == (20, 20)
    assert grid.getpixel((5, 5)) == (255, 0, 0)
    assert grid.getpixel((11, 1)) == (255, 255, 255)
    assert grid.getpixel((15, 5)) == (0, 0, 255)
    assert grid.getpixel((5, 15)) == (0, 255, 0)
    assert grid.getpixel((15, 15)) == (255, 255, 255)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(40, 128), st.integers(0, 30))
def test_tiles_put_together_are_the_picture(width: int, height: int, tile_px: int, overlap_px: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    grid = split_grid(image, tile_px, tile_px, overlap_px)
    assert all(tile.size == (tile_px, tile_px) for _, _, row in grid.tiles for _, _, tile in row)
    combined = np.asarray(combine_grid(grid)).astype(int)
    assert np.abs(combined - pixels).max() <= 1  # blending equal pixels rounds


def test_overlap_fades() -> None:
    grid = split_grid(Image.new("RGB", (96, 64)), 64, 64, 32)
    ((_, _, row),) = grid.tiles
    row[0][2], row[1][2] = Image.new("RGB", (64, 64), "black"), Image.new("RGB", (64, 64), "white")
    line = np.asarray(combine_grid(grid))[10, :, 0].astype(int)
    assert (line[:32] == 0).all()
    assert (line[64:] == 255).all()
    assert (np.diff(line[32:64]) >= 0).all()


def test_overlap_larger_than_the_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than the tile"):
        split_grid(Image.new("RGB", (9, 9)), 64, 64, 64)


def test_labels_stand_outside_the_cells() -> None:
    grid = lay_grid([Image.new("RGB", (100, 100), color) for color in ("red", "lime", "blue", "yellow")], 2, 2)
    columns = [[GridAnnotation("first column")], [GridAnnotation("second", is_active=False)]]
    rows = [[GridAnnotation("row one")], [GridAnnotation("row two")]]
    labelled = draw_labels(grid, (100, 100), columns, rows, margin_px=4, title=[[GridAnnotation("title")]], style=LabelStyle(background="#ffffff"))
    left, top = labelled.width - 204, labelled.height - 204
    assert left >= 75
    assert top > 8
    cells = np.asarray(labelled)[top:, left:]
    assert (cells[:100, :100] == (255, 0, 0)).all()
    assert (cells[104:, 104:] == (255, 255, 0)).all()
    assert (cells[:, 100:104] == 255).all()
    assert (np.asarray(labelled)[:, :left] < 128).any()
    assert (np.asarray(labelled)[:top, left:] < 128).any()
    assert draw_labels(grid, (100, 100), [[GridAnnotation()], [GridAnnotation()]], [[GridAnnotation()], [GridAnnotation()]]).size == grid.size


@pytest.mark.parametrize("text", ["in\nrain", "a\r\n\t b", "word " * 100_000, "w" * 2_000_000, "\x00\ud800\u202e", " \n "])
def test_a_label_of_any_text_keeps_the_grid_small(text: str) -> None:
    """A prompt may be a label; Pillow measures neither lines nor a million characters."""
    grid = Image.new("RGB", (64, 64))
    labelled = draw_labels(grid, (64, 64), [[GridAnnotation(text)]], [[GridAnnotation(text)]])
    assert labelled.width <= 64 * 2 and labelled.height <= 64 + 40 * MAX_LABEL_LINES


def test_a_label_that_was_cut_says_so() -> None:
    font = LabelStyle().font(8)
    assert wrap_text("one  two\nthree", font, 1000) == ["one two three"]
    cut = wrap_text("word " * 1000, font, 40)
    assert (len(cut), cut[-1]) == (MAX_LABEL_LINES, "…")


def test_prompt_matrix_labels() -> None:
    columns, rows = prompt_matrix_labels(["a", "b", "c"])
    assert [[(line.text, line.is_active) for line in label] for label in columns] == [
        [("a", False), ("b", False)],
        [("a", True), ("b", False)],
        [("a", False), ("b", True)],
        [("a", True), ("b", True)],
    ]
    assert len(rows) == 2
