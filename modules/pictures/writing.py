"""Writes pictures with their infotext atomically, and never over another file unless requested.

A file is written under a temporary name in its final folder, flushed to disk, then renamed. Must not know settings or jobs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from backend.unfinished_files import publish_new, unfinished_name
from modules.infotext.stealth import add_stealth_infotext
from modules.pictures.metadata import user_comment_exif
from modules.pictures.resizing import flatten, with_alpha_channel

PARAMETERS = "parameters"
_LARGEST_SIDE_PX = {"jpg": 65535, "jpeg": 65535, "webp": 16383, "avif": 65535, "gif": 65535}
_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF", "gif": "GIF"}
_MODES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA"), "WEBP": ("RGB", "RGBA"), "AVIF": ("RGB", "RGBA"), "GIF": ("L", "P", "RGB")}


class ImageSaveError(OSError):
    """A picture could not be written; there is no partial file under its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeSettings:
    """How to encode a picture. `quality` 1..100 for jpeg, lossy webp and avif; `stealth_mode` is None, Alpha or RGB (png only)."""

    quality: int = 80
    webp_lossless: bool = False
    write_infotext: bool = True
    stealth_mode: str = "None"


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureText:
    """Texts for the file: `infotext` under the key `section`, and other PNG chunks."""

    infotext: str | None = None
    section: str = PARAMETERS
    chunks: Mapping[str, str] = field(default_factory=dict)


def known_extensions() -> tuple[str, ...]:
    """Formats that can be written, without the dot."""
    return tuple(_FORMATS)


def kind_that_holds(image: Image.Image, extension: str) -> str:
    """`extension`, or "png" for a picture with more pixels per side than that format allows."""
    kind = extension.lower().lstrip(".")
    return "png" if max(image.size) > _LARGEST_SIDE_PX.get(kind, max(image.size)) else kind


def encode_image(image: Image.Image, target: BinaryIO, extension: str, text: PictureText, settings: EncodeSettings) -> None:
    """Write `image` into the open file `target` as `extension` ("png", "jpg" ...). Raises ImageSaveError for what the format cannot store."""
    extension = extension.lower().lstrip(".")
    image_format = _FORMATS.get(extension)
    if image_format is None:
        raise ImageSaveError(f"pictures cannot be saved as .{extension}; choose one of {', '.join(_FORMATS)} in the settings.")
    limit_px = _LARGEST_SIDE_PX.get(extension)
    if limit_px and max(image.size) > limit_px:
        raise ImageSaveError(f"a picture of {image.width}x{image.height} px is too large for .{extension} ({limit_px} px per side); save it as png.")
    infotext = text.infotext if settings.write_infotext else None
    if image_format == "PNG":
        _encode_png(image, target, infotext, text, settings)
        return
    arguments: dict[str, Any] = {"comment": infotext} if image_format == "GIF" and infotext else {}
    if image_format != "GIF":
        arguments["quality"] = settings.quality
        if infotext:
            arguments["exif"] = user_comment_exif(infotext)
    if image_format == "WEBP":
        arguments["lossless"] = settings.webp_lossless
    _in_savable_mode(image, image_format).save(target, format=image_format, **arguments)


def _encode_png(image: Image.Image, target: BinaryIO, infotext: str | None, text: PictureText, settings: EncodeSettings) -> None:
    chunks = PngImagePlugin.PngInfo()
    if settings.write_infotext:
        values = dict(text.chunks) | ({text.section: infotext} if infotext is not None else {})
        for key, value in values.items():
            chunks.add_text(_chunk_key(key), str(value).replace("\0", ""))
    image = _in_savable_mode(image, "PNG")
    if infotext and settings.stealth_mode in ("Alpha", "RGB") and image.mode in ("RGB", "RGBA"):
        with contextlib.suppress(ValueError):  # a picture with too few pixels only has the chunk
            image = add_stealth_infotext(image, infotext, settings.stealth_mode)
    image.save(target, format="PNG", pnginfo=chunks)


def _chunk_key(key: str) -> str:
    """A PNG keyword: 1 to 79 bytes of Latin-1."""
    return key.encode("latin-1", "replace").decode("latin-1").replace("\0", "")[:79] or "text"


def _in_savable_mode(image: Image.Image, image_format: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        if image_format != "PNG" or image.mode == "F":
            return _eight_bit(image)
        return image if image.mode == "I;16" else image.convert("I;16")
    if image_format == "JPEG":
        return image if image.mode in ("L", "RGB", "CMYK") else flatten(image, "#ffffff")
    if image.mode in _MODES[image_format]:
        return image
    return with_alpha_channel(image) if "RGBA" in _MODES[image_format] and image.mode in ("LA", "PA", "La", "RGBa") else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return image.convert("L").convert("RGB")
    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")


# Temporary name, then the final one


@contextlib.contextmanager
def temporary_file(folder: Path, name: str) -> Iterator[tuple[Path, BinaryIO]]:
    """A new hidden file in `folder`, with the default permissions of new files. Deleted afterwards unless it was renamed."""
    path = unfinished_name(folder / name)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def write_whole(write: Callable[[BinaryIO], object], names: Iterable[Path], *, replace: bool = False) -> Path:
    """Write a file with `write` under the first free of `names` (`replace`: the first). Returns that name.

    All names are in one folder, which is created. Raises ImageSaveError; then none of the names has a new file.
    """
    candidates = iter(names)
    first = next(candidates)
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(first.parent, first.name) as (temporary, file):
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            if replace:
                temporary.replace(first)
                return first
            for final in itertools.chain([first], candidates):
                try:
                    publish_new(temporary, final)
                    return final
                except FileExistsError:
                    continue
    except ImageSaveError:
        raise
    except OSError as error:
        remedy = "Free disk space, or choose another folder in Settings, Paths for saving."
        raise ImageSaveError(f"cannot write {first}: {error.strerror or error}. {remedy}") from error
    raise ImageSaveError(f"cannot write {first}: all names tried are taken. Choose another file name pattern in the settings.")


def write_image(
    image: Image.Image, names: Iterable[Path], text: PictureText, settings: EncodeSettings, *, extension: str | None = None, replace: bool = False
) -> Path:
    """Write `image` under the first free of `names`, in the format given by the extension. Raises ImageSaveError."""
    names, peeked = itertools.tee(iter(names))
    kind = extension or next(peeked).suffix
    return write_whole(lambda file: encode_image(image, file, kind, text, settings), names, replace=replace)


def numbered_names(path: Path) -> Iterator[Path]:
    """`path`, then `path` with -1, -2 ... appended to its stem."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
