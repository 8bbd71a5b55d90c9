"""The job of the Extras tab: reads pictures from uploads or a folder, postprocesses each, and saves it with its original metadata.

Must not know the page; the operations to run are passed in as a list.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from backend.model_folders import find_files
from modules.errors import RequestError
from modules.infotext.text import build_parameters_line
from modules.pictures import images
from modules.pictures.metadata import read_info_from_image
from modules.pictures.own_files import note_own_file, text_goes_with
from modules.pictures.resizing import fix_image
from modules.pictures.writing import numbered_names, write_whole
from modules.scripts.postprocessing import Operation, PostprocessedImage, run_operations

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

SINGLE, BATCH, FOLDER = 0, 1, 2
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class ExtrasRequest:
    """`paths` are the pictures. `keeps_names`: results keep the names of their sources. `output_dir` None is the default folder."""

    paths: Sequence[Path]
    operations: Sequence[Operation]
    output_dir: Path | None = None
    keeps_names: bool = False
    shows_results: bool = True


@dataclass(kw_only=True)
class ExtrasProcessed:
    """The job's result: pictures, the text of each, and notes for the user."""

    images: list[Image.Image] = field(default_factory=list)
    infotexts: list[str] = field(default_factory=list)
    info: str = ""
    comments: str = ""

    def js(self) -> str:
        """The texts as JSON, the form the page keeps with its gallery."""
        return json.dumps({"infotexts": self.infotexts, "index_of_first_image": 0})


def pictures_in(folder: str) -> list[Path]:
    """The pictures in a server folder. Raises RequestError if there are none."""
    if not Path(folder).is_dir():
        raise RequestError(f"Input directory {folder!r} does not exist. Folders are on the server.")
    paths = find_files(Path(folder), PICTURE_SUFFIXES)
    if not paths:
        raise RequestError(f"There are no pictures in {folder!r}. Supported formats: {', '.join(PICTURE_SUFFIXES)}.")
    return paths


class ExtrasJob:
    """Runs one request, on the job's thread."""

    def __init__(self, app: Application, request: ExtrasRequest) -> None:
        self.app = app
        self.request = request
        self.processed = ExtrasProcessed()

    def run(self) -> ExtrasProcessed:
        """Raises RequestError for what an operation cannot do, or if no picture could be read."""
        state, paths = self.app.state, self.request.paths
        state.job_count = len(paths)
        num_read = 0
        for number, path in enumerate(paths, start=1):
            if state.interrupted or state.stopping_generation:
                break
            state.skipped = False
            state.textinfo = f"{path.name} ({number} of {len(paths)})"
            if (picture := self._read(path)) is not None:
                num_read += 1
                self._process(path, picture)
            state.nextjob()
        if paths and not num_read and not (state.interrupted or state.stopping_generation):
            raise RequestError(f"No picture could be read. {self.processed.comments.strip()}")
        return self.processed

    def _read(self, path: Path) -> Image.Image | None:
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            self._comment(f"{path.name} could not be read ({error}); it was skipped.")
            return None

    def _comment(self, text: str) -> None:
        log.warning("Extras: %s", text)
        self.processed.comments += f"{text}\n"

    def _process(self, path: Path, picture: Image.Image) -> None:
        geninfo, items = read_info_from_image(picture)
        upright = fix_image(picture)
        assert upright is not None
        first = PostprocessedImage(upright.convert("RGBA" if upright.mode == "RGBA" else "RGB"))
        state = self.app.state
        run_operations(first, self.request.operations, is_stopped=lambda: state.interrupted or state.skipped)
        suffixes: dict[str, int] = {}
        for result in (first, *first.extra_images):
            self._finish(path, result, geninfo, items, result.get_suffix(suffixes))

    def _finish(self, path: Path, result: PostprocessedImage, geninfo: str | None, items: Mapping[str, Any], suffix: str) -> None:
        """Save one result and add it to the gallery. `geninfo` and `items` are the source file's metadata."""
        done = build_parameters_line(result.info)
        text = ", ".join(part for part in (geninfo, done) if part)
        options = self.app.options
        result.image.info = {"parameters": text, "postprocessing": done} if options.enable_pnginfo and text else {}
        is_lost = False
        if options.samples_save:
            saved = self._save_or_comment(path, result, text, {**items, **({"postprocessing": done} if done else {})}, suffix)
            is_lost = saved is None
            if saved is not None:
                self._save_caption(saved, result.caption)
        if self.request.shows_results or is_lost:
            self.processed.images.append(result.image)
            self.processed.infotexts.append(text)
            self.processed.info = self.processed.info or text
        self.app.state.assign_current_image(result.image)

    def _save_or_comment(self, path: Path, result: PostprocessedImage, text: str, chunks: Mapping[str, Any], suffix: str) -> Path | None:
        """The file, or None after a comment: an unwritable folder loses the file, not the picture."""
        try:
            return self._save(path, result, text, chunks, suffix)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the folder's name
            self._comment(f"The result of {path.name} was not saved: {error}")
            return None

    def _save(self, path: Path, result: PostprocessedImage, text: str, chunks: Mapping[str, Any], suffix: str) -> Path:
        options, request = self.app.options, self.request
        folder = Path(request.output_dir or options.outdir_samples or options.outdir_extras_samples)
        is_own_folder = folder.resolve() == path.resolve().parent  # a result never replaces its source
        uses_name = request.keeps_names and options.use_original_name_batch and not is_own_folder
        saved, _ = images.save_image(
            result.image,
            folder,
            "",
            extension=options.samples_format,
            info=text or None,
            short_filename=True,
            no_prompt=True,
            existing_info=chunks,
            forced_filename=f"{path.stem}{suffix}" if uses_name else None,
            suffix=suffix,
        )
        return Path(saved)

    def _save_caption(self, picture: Path, caption: str | None) -> None:
        """Write a text file next to the picture if an operation produced a caption."""
        if not caption:
            return
        wanted = picture.with_suffix(".txt")
        try:
            written = write_caption(wanted, picture, caption.strip(), self.app.options.postprocessing_existing_caption_action)
        except OSError as error:
            self._comment(f"The caption {wanted.name} was not written ({error}).")
            return
        if written != wanted:
            self._comment(f"{wanted.name} already exists and was not written by this program, so the caption is in {written.name}.")


def write_caption(wanted: Path, picture: Path, caption: str, action: str) -> Path:
    """Write the caption of `picture` to `wanted`, or to the next free name if `wanted` is a user's text. Returns the name used.

    A user's text is changed only by Prepend and Append, which keep its words. Raises OSError.
    """
    is_own, before = text_goes_with(picture), _read_caption(wanted)
    if action == "Keep" and before != "":
        return wanted
    joins = is_own or action in ("Prepend", "Append")
    text = joined_caption(before or "", caption, action) if joins else caption
    replaces = is_own or (joins and bool(before))
    written = write_whole(lambda file: file.write(text.encode("utf-8", "replace")), numbered_names(wanted), replace=replaces)
    if is_own or not replaces:
        note_own_file(written)
    return written


def _read_caption(file: Path) -> str | None:
    """The text in `file`, "" if it does not exist, None if it is not UTF-8 text. Raises OSError."""
    if not file.exists():
        return ""
    try:
        return file.read_text(encoding="utf-8-sig").strip() if file.is_file() else None
    except UnicodeDecodeError:
        return None


def joined_caption(before: str, new: str, action: str) -> str:
    """The caption to keep, given an existing one: Ignore it, Keep it, or put the new text before (Prepend) or after it (Append)."""
    if not before or action == "Ignore":
        return new
    return {"Keep": before, "Prepend": f"{new} {before}", "Append": f"{before} {new}"}.get(action, new)


def requests_paths(mode: int, image: str | None, files: Sequence[Any] | None, input_dir: str) -> Iterator[Path]:
    """The pictures chosen in inner tab `mode` of the Extras tab. Raises RequestError if there are none."""
    if mode == FOLDER:
        if not input_dir.strip():
            raise RequestError("Batch from Directory needs an input directory: name one.")
        yield from pictures_in(input_dir.strip())
        return
    given = [image] if mode == SINGLE else list(files or [])
    if not any(given):
        raise RequestError("Extras needs a picture: put one into the field above." if mode == SINGLE else "Extras needs pictures: upload some.")
    yield from (Path(str(getattr(file, "name", file))) for file in given)
