"""Pictures under the names that extensions import: saving, resizing, grids, reading embedded text.

The other files of modules/pictures do the work; this file connects them with the settings. It must not know how a picture is made.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont

from modules.jobs.context import installed_context
from modules.pictures.filename_tokens import (
    NOTHING_AND_SKIP_PREVIOUS_TEXT,
    FilenameGenerator,
    fit_filename,
    sanitize_filename_part,
    sanitize_folder,
)
from modules.pictures.grids import (
    Grid,
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
from modules.pictures.metadata import IGNORED_INFO_KEYS, image_data, read_info_from_image
from modules.pictures.own_files import is_own_file, note_own_file, text_goes_with
from modules.pictures.resizing import fix_image, flatten, resize_by_mode
from modules.pictures.upscaler import LANCZOS, NEAREST, find_upscaler
from modules.pictures.upscaler_list import available_upscalers
from modules.pictures.writing import EncodeSettings, ImageSaveError, PictureText, kind_that_holds, numbered_names, write_image, write_whole
from modules.scripts import callbacks as script_callbacks
from modules.scripts.hook_arguments import ImageGridLoopParams, ImageSaveParams
from modules.settings.options import Options, OptionsSnapshot
from modules.settings.table import build_option_table

__all__ = [
    "IGNORED_INFO_KEYS",
    "LANCZOS",
    "NEAREST",
    "NOTHING_AND_SKIP_PREVIOUS_TEXT",
    "FilenameGenerator",
    "Grid",
    "GridAnnotation",
    "ImageSaveError",
    "check_grid_size",
    "combine_grid",
    "draw_grid_annotations",
    "draw_prompt_matrix",
    "fix_image",
    "flatten",
    "get_font",
    "get_next_sequence_number",
    "image_data",
    "image_grid",
    "read",
    "read_info_from_image",
    "resize_image",
    "sanitize_filename_part",
    "save_image",
    "save_image_with_geninfo",
    "split_grid",
    "wrap_text",
]

log = logging.getLogger(__name__)

_COPY_SUFFIX = ".jpg"
_CONTROL_CHARS = dict.fromkeys((*range(32), 127, *map(ord, '<>:"|?*')), "_")


@functools.lru_cache(maxsize=1)
def _default_settings() -> OptionsSnapshot:
    """Every setting at its default, for use without an application."""
    return Options(build_option_table({}, outputs_dir=Path("outputs"), saved_dir=Path("log/images"))).snapshot()


def _settings(p: Any = None) -> Any:
    """The settings for `p`: its own frozen ones, else the application's."""
    own = getattr(p, "options", None)
    if own is not None:
        return own
    application = installed_context()
    return _default_settings() if application is None else application.options


def _tokens(p: Any, seed: int | None, prompt: str | None, image: Image.Image, basename: str, settings: Any) -> FilenameGenerator:
    """The tokens of one picture, using the application's styles and limits."""
    application = installed_context()
    extra: dict[str, Any] = {}
    if application is not None:
        extra["max_part_chars"] = application.config.filenames_max_length
        extra["style_prompts"] = application.styles.get_style_prompts(getattr(p, "styles", None) or [])
    return FilenameGenerator(p, seed, prompt, image, basename=basename, options=settings, **extra)


# Resizing and grids


def resize_image(
    resize_mode: int, im: Image.Image, width: int, height: int, upscaler_name: str | None = None, force_RGBA: bool = False
) -> Image.Image:
    """`im` at this size. Mode 0 stretches it, 1 crops it, 2 fits it and extends its edges.

    `upscaler_name` (default: the img2img setting) does the upscaling. Raises RequestError for an unknown name.
    """
    name = upscaler_name or _settings().upscaler_for_img2img
    upscaler = None if name in (None, "", "None") else find_upscaler(name, available_upscalers())
    resized = resize_by_mode(resize_mode, im, width, height, upscaler)
    return resized.convert("RGBA") if force_RGBA else resized


def image_grid(imgs: Sequence[Image.Image], batch_size: int = 1, rows: int | None = None) -> Image.Image:
    """The pictures as one grid; rows and columns follow the settings unless `rows` is given."""
    settings = _settings()
    wanted = settings.n_rows if rows is None else rows
    count = choose_num_rows(len(imgs), wanted_rows=wanted, batch_size=batch_size, prevent_empty_spots=settings.grid_prevent_empty_spots)
    grid = ImageGridLoopParams(imgs, math.ceil(len(imgs) / count), count)
    script_callbacks.image_grid_callback(grid)
    return lay_grid(grid.imgs, grid.rows, grid.cols, settings.grid_background_color)


def check_grid_size(imgs: Sequence[Image.Image]) -> bool:
    """Whether a grid of these pictures stays within the setting img_max_size_mp."""
    return sum(image.width * image.height for image in imgs) <= _settings().img_max_size_mp * 1_000_000


def get_font(fontsize: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The font of the settings (Pillow's own where none is named) in a size in pixels."""
    return LabelStyle(font_path=_settings().font).font(fontsize)


def draw_grid_annotations(
    im: Image.Image,
    width: int,
    height: int,
    hor_texts: Sequence[Sequence[GridAnnotation]],
    ver_texts: Sequence[Sequence[GridAnnotation]],
    margin: int = 0,
    title: Sequence[Sequence[GridAnnotation]] | None = None,
) -> Image.Image:
    """The grid `im` of cells of `width` x `height` with labels above its columns and left of its rows."""
    settings = _settings()
    style = LabelStyle(
        active=settings.grid_text_active_color,
        inactive=settings.grid_text_inactive_color,
        background=settings.grid_background_color,
        font_path=settings.font,
    )
    return draw_labels(im, (width, height), hor_texts, ver_texts, margin_px=margin, title=title, style=style)


def draw_prompt_matrix(im: Image.Image, width: int, height: int, all_prompts: Sequence[str], margin: int = 0) -> Image.Image:
    """The grid of a prompt matrix with labels; `all_prompts` contains the fixed part, then the optional ones."""
    columns, rows = prompt_matrix_labels(all_prompts[1:])
    return draw_grid_annotations(im, width, height, columns, rows, margin)


def read(fp: Any, **kwargs: Any) -> Image.Image:
    """The picture in a file, rotated according to its EXIF orientation."""
    image = Image.open(fp, **kwargs)
    image.load()  # closes the file
    fixed = fix_image(image)
    assert fixed is not None
    return fixed


# Saving


def get_next_sequence_number(path: str | os.PathLike[str], basename: str) -> int:
    """One more than the highest number at the start of file names in folder `path` (after `basename-`, if given); 0 in an empty folder."""
    prefix = f"{basename}-" if basename else ""
    try:
        names = [entry.name for entry in os.scandir(path) if entry.name.startswith(prefix)]
    except FileNotFoundError:
        return 0
    numbers = (name[len(prefix) :].split(".")[0].split("-")[0] for name in names)
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a picture goes: candidate names in order."""

    folder: Path
    names: Iterator[Path]
    replace: bool


def save_image(
    image: Image.Image,
    path: str | os.PathLike[str],
    basename: str,
    seed: int | None = None,
    prompt: str | None = None,
    extension: str = "png",
    info: str | None = None,
    short_filename: bool = False,
    no_prompt: bool = False,
    grid: bool = False,
    pnginfo_section_name: str = "parameters",
    p: Any = None,
    existing_info: Mapping[str, Any] | None = None,
    forced_filename: str | None = None,
    suffix: str = "",
    save_to_dirs: bool | None = None,
) -> tuple[str, str | None]:
    """Write `image` into folder `path` under a name from the settings. Returns (its path, path of its text file or None).

    The write is atomic. The file gets the next free number, so it never replaces another file. A name without a number may replace a file
    only if the settings say Replace and this program wrote that file. Raises ImageSaveError.
    """
    settings = _settings(p)
    tokens = _tokens(p, seed, prompt, image, basename, settings)
    if save_to_dirs is None:
        save_to_dirs = bool(settings.grid_save_to_dirs if grid else settings.save_to_dirs and not no_prompt)
    folder = Path(path)
    if save_to_dirs:
        folder /= sanitize_folder(tokens.apply(settings.directories_filename_pattern or "[prompt_words]"))
    wanted, extension = extension, kind_that_holds(image, extension)
    if extension != wanted.lower().lstrip("."):
        log.warning("A picture of %dx%d px is too large for a .%s file; it is saved as .%s.", *image.size, wanted, extension)
    if forced_filename is not None:
        place = _named_place(folder, Path(forced_filename).name, extension, settings)
    else:
        plain = short_filename or seed is None or prompt is None
        pattern = "" if plain else settings.samples_filename_pattern or ("[seed]" if save_to_dirs else "[seed]-[prompt_spaces]")
        place = _patterned_place(folder, basename, tokens.apply(pattern) + suffix, extension, settings, plain=not pattern)

    _check_place(Path(path), place)
    saving = ImageSaveParams(image, p, "", {} if info is None else {pnginfo_section_name: info})
    place = _ask_before_saving(saving, place)
    first, names = _first_of(place.names)
    replaces, replaces_text = place.replace and is_own_file(first), place.replace and text_goes_with(first)
    image, info = saving.image, saving.pnginfo.pop(pnginfo_section_name, None)
    text = PictureText(infotext=info, section=pnginfo_section_name, chunks=_chunks({**(existing_info or {}), **saving.pnginfo}))
    written = write_image(image, names, text, _encode_settings(settings), extension=extension, replace=replaces)
    note_own_file(written)
    image.already_saved_as = str(written)  # type: ignore[attr-defined]  # extensions and the page look for it
    saving.filename, saving.pnginfo = str(written), {**saving.pnginfo, **({} if info is None else {pnginfo_section_name: info})}
    script_callbacks.image_saved_callback(saving)
    _save_large_copy(image, written, text, settings)
    text_path = _save_text(written, info, replaces_text and written == first, p) if settings.save_txt and info is not None else None
    return str(written), None if text_path is None else str(text_path)


def _check_place(wanted: Path, place: _Place) -> None:
    """Raises RequestError if a name pattern points into the program's own files."""
    application = installed_context()
    if application is not None and place.folder != wanted:
        application.folders.check_written(wanted, place.folder)


def _first_of(names: Iterator[Path]) -> tuple[Path, Iterator[Path]]:
    names, peeked = itertools.tee(names)
    return next(peeked), names


def _ask_before_saving(saving: ImageSaveParams, place: _Place) -> _Place:
    """Let listeners change the picture, its infotext and its name. Returns its final place."""
    if not script_callbacks.is_listened_to("before_image_saved"):
        return place
    names, peeked = itertools.tee(place.names)
    wanted = next(name for name in peeked if place.replace or not name.exists())
    saving.filename = str(wanted)
    script_callbacks.before_image_saved_callback(saving)
    chosen = Path(saving.filename)
    return _Place(folder=chosen.parent, names=names if chosen == wanted else numbered_names(chosen), replace=place.replace)


def _named_place(folder: Path, stem: str, extension: str, settings: Any) -> _Place:
    name = folder / fit_filename(stem, f".{extension}")
    return _Place(folder=folder, names=numbered_names(name), replace=settings.save_images_replace_action == "Replace")


def _patterned_place(folder: Path, basename: str, decoration: str, extension: str, settings: Any, *, plain: bool) -> _Place:
    """Names with a running number, or just the decoration if the settings ask for no number (and there is a decoration)."""
    decoration = sanitize_pattern(decoration)
    if not (settings.save_images_add_number or plain):
        return _named_place(folder / Path(decoration).parent, Path(decoration).name, extension, settings)
    first = get_next_sequence_number(folder, basename)
    tail = f"-{decoration}" if decoration and not plain else decoration
    return _Place(folder=folder, names=_sequence(folder, basename, first, tail.replace("/", "_"), extension), replace=False)


def sanitize_pattern(text: str) -> str:
    """A file name pattern after token replacement, with every part that leaves the folder removed."""
    parts = [fit_filename(part.translate(_CONTROL_CHARS), "") for part in text.replace("\\", "/").split("/") if part.strip(". ")]
    return "/".join(parts)


def _sequence(folder: Path, basename: str, first: int, tail: str, extension: str) -> Iterator[Path]:
    for number in itertools.count(first):
        head = f"{basename}-{number:04}" if basename else f"{number:05}"
        yield folder / fit_filename(head + tail, f".{extension}")


def _chunks(existing_info: Mapping[str, Any] | None) -> dict[str, str]:
    return {key: str(value) for key, value in (existing_info or {}).items() if isinstance(value, (str, int, float))}


def _encode_settings(settings: Any) -> EncodeSettings:
    return EncodeSettings(
        quality=int(settings.jpeg_quality),
        webp_lossless=bool(settings.webp_lossless),
        write_infotext=bool(settings.enable_pnginfo),
        stealth_mode=str(settings.stealth_pnginfo_option),
    )


def _save_text(picture: Path, info: str, replace: bool, p: Any) -> Path | None:
    """Write the infotext next to the picture. If that fails, returns None and comments on job `p`: the picture itself is saved."""
    names = numbered_names(picture.with_suffix(".txt"))
    try:
        written = write_whole(lambda file: file.write(f"{info}\n".encode("utf-8", "replace")), names, replace=replace)
    except ImageSaveError as error:
        log.warning("The text file of %s was not written: %s", picture.name, error)
        if hasattr(p, "comment"):
            p.comment(f"Text file not saved: {error}")
        return None
    note_own_file(written)
    return written


def _save_large_copy(image: Image.Image, picture: Path, text: PictureText, settings: Any) -> None:
    """Save a smaller jpg next to a picture that is large in pixels or bytes, if enabled. Not for a jpg: the copy would replace it."""
    if not settings.export_for_4chan or picture.suffix in (".jpg", ".jpeg"):
        return
    side_px = int(settings.target_side_length)
    if max(image.size) <= side_px and picture.stat().st_size <= settings.img_downscale_threshold * 1024 * 1024:
        return
    copy = image
    if max(image.size) > side_px > 0:
        factor = side_px / max(image.size)
        copy = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), LANCZOS)
    try:
        write_image(copy, numbered_names(picture.with_suffix(_COPY_SUFFIX)), text, _encode_settings(settings))
    except ImageSaveError as error:
        log.warning("The jpg copy of %s was not written: %s", picture.name, error)


def save_image_with_geninfo(
    image: Image.Image,
    geninfo: str | None,
    filename: str | os.PathLike[str],
    extension: str | None = None,
    existing_pnginfo: Mapping[str, Any] | None = None,
    pnginfo_section_name: str = "parameters",
) -> None:
    """Write `image` to `filename` (replacing it) with its infotext. Raises ImageSaveError."""
    text = PictureText(infotext=geninfo, section=pnginfo_section_name, chunks=_chunks(existing_pnginfo))
    write_image(image, [Path(filename)], text, _encode_settings(_settings()), extension=extension, replace=True)
