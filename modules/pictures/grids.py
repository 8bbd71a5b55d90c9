"""Combines several pictures: grids, labels, and overlapping tiles. Must not know settings; colors and fonts are arguments."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Grid = namedtuple("Grid", ["tiles", "tile_w", "tile_h", "image_w", "image_h", "overlap"])
"""`tiles` is [[y, height, [[x, width, picture], ...]], ...]."""


def choose_num_rows(num_images: int, *, wanted_rows: int, batch_size: int, prevent_empty_spots: bool) -> int:
    """Number of rows: `wanted_rows` if positive, the batch size for 0, else (-1) roughly square."""
    if wanted_rows > 0:
        rows = wanted_rows
    elif wanted_rows == 0:
        rows = batch_size
    elif prevent_empty_spots:
        rows = math.isqrt(num_images)
        while num_images % rows:
            rows -= 1
    else:
        rows = round(math.sqrt(num_images))
    return max(1, min(rows, num_images))


def lay_grid(images: Sequence[Image.Image], rows: int, columns: int, background: str = "black") -> Image.Image:
    """The pictures row by row, each centered in a cell as large as the largest."""
    cell_width, cell_height = max(image.width for image in images), max(image.height for image in images)
    grid = Image.new("RGB", (columns * cell_width, rows * cell_height), background)
    for index, image in enumerate(images[: rows * columns]):
        left = index % columns * cell_width + (cell_width - image.width) // 2
        top = index // columns * cell_height + (cell_height - image.height) // 2
        grid.paste(image, (left, top))
    return grid


# Overlapping tiles


def _starts_px(length_px: int, tile_px: int, overlap_px: int) -> list[int]:
    """Start positions of tiles that cover `length_px` evenly and overlap by at least `overlap_px`."""
    if length_px <= tile_px:
        return [0]
    count = math.ceil((length_px - overlap_px) / (tile_px - overlap_px))
    step = (length_px - tile_px) / (count - 1)
    return [int(index * step) for index in range(count)]


def split_grid(image: Image.Image, tile_w: int = 512, tile_h: int = 512, overlap: int = 64) -> Grid:
    """`image` as tiles that overlap by at least `overlap` px. Raises ValueError unless tiles are larger than the overlap."""
    if overlap >= min(tile_w, tile_h) or overlap < 0:
        raise ValueError(f"tiles of {tile_w}x{tile_h} cannot overlap by {overlap} px; the overlap must be smaller than the tile.")
    rows = []
    for top in _starts_px(image.height, tile_h, overlap):
        tiles = [[left, tile_w, image.crop((left, top, left + tile_w, top + tile_h))] for left in _starts_px(image.width, tile_w, overlap)]
        rows.append([top, tile_h, tiles])
    return Grid(rows, tile_w, tile_h, image.width, image.height, overlap)


def _ramp_mask(width_px: int, height_px: int, *, vertical: bool) -> Image.Image:
    ramp = np.linspace(0, 255, height_px if vertical else width_px, dtype=np.uint8)
    plane = np.tile(ramp[:, None], (1, width_px)) if vertical else np.tile(ramp[None, :], (height_px, 1))
    return Image.fromarray(plane)


def _paste_blended(base: Image.Image, piece: Image.Image, at: tuple[int, int], overlap_px: int, *, vertical: bool) -> None:
    """Paste `piece`; its first `overlap_px` rows (or columns) blend into what is there."""
    left, top = at
    if overlap_px > 0:
        size = (piece.width, min(overlap_px, piece.height)) if vertical else (min(overlap_px, piece.width), piece.height)
        base.paste(piece.crop((0, 0, *size)), (left, top), mask=_ramp_mask(*size, vertical=vertical))
        shift = (0, size[1]) if vertical else (size[0], 0)
        piece = piece.crop((*shift, piece.width, piece.height))
        left, top = left + shift[0], top + shift[1]
    base.paste(piece, (left, top))


def combine_grid(grid: Grid) -> Image.Image:
    """The inverse of split_grid(): one picture with the tiles blended into each other."""
    combined = Image.new("RGB", (grid.image_w, grid.image_h))
    bottom = 0
    for top, height, row in grid.tiles:
        strip = Image.new("RGB", (grid.image_w, height))
        right = 0
        for left, width, tile in row:
            _paste_blended(strip, tile, (left, 0), right - left, vertical=False)
            right = left + width
        _paste_blended(combined, strip, (0, top), bottom - top, vertical=True)
        bottom = top + height
    return combined


# Labels


class GridAnnotation:
    """One line of a label; inactive ones are gray and struck through."""

    def __init__(self, text: str = "", is_active: bool = True) -> None:
        self.text = text
        self.is_active = is_active
        self.size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelStyle:
    """Colors and font of labels. An empty `font_path` means Pillow's default font."""

    active: str = "#000000"
    inactive: str = "#999999"
    background: str = "#ffffff"
    font_path: str = ""

    def font(self, size_px: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
        if self.font_path:
            return ImageFont.truetype(self.font_path, round(size_px))
        return ImageFont.load_default(size_px)


@dataclass(kw_only=True)
class _Labels:
    """The labels of one side, wrapped and measured."""

    lines: list[list[GridAnnotation]]
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont
    gap_px: int
    heights_px: list[int] = field(default_factory=list)


_PEN = ImageDraw.Draw(Image.new("L", (1, 1)))


def _text_width(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> float:
    return _PEN.textlength(text, font=font)


MAX_LABEL_CHARS = 1000
MAX_LABEL_LINES = 24
"""A prompt may be a label; more of it than this makes no grid readable, and could make it as large as a client likes."""


def wrap_text(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, max_width_px: float) -> list[str]:
    """`text` as lines no wider than `max_width_px`, broken at white space; a longer word gets its own line. "…" ends a text that was cut."""
    lines = _wrap(text[:MAX_LABEL_CHARS], font, max_width_px)
    if len(text) > MAX_LABEL_CHARS or len(lines) > MAX_LABEL_LINES:
        lines = [*lines[: MAX_LABEL_LINES - 1], "…"]
    return lines


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, max_width_px: float) -> list[str]:
    lines: list[str] = []
    for word in text.split() or [""]:
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _text_width(joined, font) <= max_width_px:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _wrap_labels(
    texts: Sequence[Sequence[GridAnnotation]], font: ImageFont.ImageFont | ImageFont.FreeTypeFont, max_width_px: float, gap_px: int
) -> _Labels:
    labels = _Labels(lines=[], font=font, gap_px=gap_px)
    for label in texts:
        wrapped = [GridAnnotation(line, entry.is_active) for entry in label for line in wrap_text(entry.text, font, max_width_px)]
        for line in wrapped:
            box = _PEN.textbbox((0, 0), line.text or " ", font=font)
            line.size = (math.ceil(_text_width(line.text, font)), math.ceil(box[3]))
        labels.lines.append(wrapped)
        labels.heights_px.append(sum(line.size[1] + gap_px for line in wrapped if line.size) - (gap_px if wrapped else 0))
    return labels


def _draw_label(pen: ImageDraw.ImageDraw, centre_x: float, top: float, label: Sequence[GridAnnotation], labels: _Labels, style: LabelStyle) -> None:
    for line in label:
        width, height = line.size or (0, 0)
        pen.text((centre_x, top), line.text, font=labels.font, fill=style.active if line.is_active else style.inactive, anchor="ma")
        if not line.is_active:
            middle = top + height // 2
            pen.line((centre_x - width // 2, middle, centre_x + width // 2, middle), fill=style.inactive, width=max(1, height // 12))
        top += height + labels.gap_px


def draw_labels(
    image: Image.Image,
    cell_px: tuple[int, int],
    column_texts: Sequence[Sequence[GridAnnotation]],
    row_texts: Sequence[Sequence[GridAnnotation]],
    *,
    margin_px: int = 0,
    title: Sequence[Sequence[GridAnnotation]] | None = None,
    style: LabelStyle | None = None,
) -> Image.Image:
    """`image`, a grid of cells of `cell_px`, with labels above its columns and left of its rows, and a title on top."""
    style = style or LabelStyle()
    width, height = cell_px
    font_px = max(8.0, (width + height) / 25)
    gap_px = round(font_px / 2)
    rows, columns = len(row_texts), len(column_texts)
    has_row_labels = any(line.text for label in row_texts for line in label)
    pad_left = width * 3 // 4 if has_row_labels else 0
    column_labels = _wrap_labels(column_texts, style.font(font_px), width, gap_px)
    row_labels = _wrap_labels(row_texts, style.font(font_px), pad_left or width, gap_px)
    title_labels = _wrap_labels(title or [], style.font(font_px * 1.5), image.width + pad_left, gap_px)
    title_px = max(title_labels.heights_px, default=0) + (gap_px * 2 if title else 0)
    has_column_labels = any(line.text for label in column_texts for line in label)
    pad_top = (max(column_labels.heights_px) + gap_px * 2 if has_column_labels else 0) + title_px

    result = Image.new("RGB", (image.width + pad_left + margin_px * (columns - 1), image.height + pad_top + margin_px * (rows - 1)), style.background)
    pen = ImageDraw.Draw(result)
    for row in range(rows):
        for column in range(columns):
            cell = image.crop((width * column, height * row, width * (column + 1), height * (row + 1)))
            result.paste(cell, (pad_left + (width + margin_px) * column, pad_top + (height + margin_px) * row))
    for label in title_labels.lines[:1]:
        _draw_label(pen, result.width / 2, gap_px, label, title_labels, style)
    for column, label in enumerate(column_labels.lines):
        top = title_px + (pad_top - title_px - column_labels.heights_px[column]) / 2
        _draw_label(pen, pad_left + (width + margin_px) * column + width / 2, top, label, column_labels, style)
    for row, label in enumerate(row_labels.lines):
        top = pad_top + (height + margin_px) * row + (height - row_labels.heights_px[row]) / 2
        _draw_label(pen, pad_left / 2, top, label, row_labels, style)
    return result


def prompt_matrix_labels(prompt_parts: Sequence[str]) -> tuple[list[list[GridAnnotation]], list[list[GridAnnotation]]]:
    """(column labels, row labels) of a prompt matrix with optional parts `prompt_parts`: the first half across, the rest down."""
    half = math.ceil(len(prompt_parts) / 2)

    def labels(parts: Sequence[str]) -> list[list[GridAnnotation]]:
        return [[GridAnnotation(part, is_active=bool(bits >> place & 1)) for place, part in enumerate(parts)] for bits in range(1 << len(parts))]

    return labels(prompt_parts[:half]), labels(prompt_parts[half:])
