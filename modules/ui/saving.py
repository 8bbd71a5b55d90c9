"""The buttons under a gallery that keep pictures: save, zip, open folder. Files are copied byte for byte, so nothing is lost."""

from __future__ import annotations

import csv
import io
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from backend.unfinished_files import append_text
from modules.errors import RequestError
from modules.pictures.writing import numbered_names, write_whole
from modules.ui.page_files import PICTURE_SUFFIXES, ForeignFileError, file_below, picture_of_page
from modules.ui.shown_text import error_html, picture_at, plaintext_to_html, read_generation_info

if TYPE_CHECKING:
    from modules.application import Application
    from modules.ui.common import OutputPanel

log = logging.getLogger(__name__)

LOG_COLUMNS = ("prompt", "seed", "width", "height", "sampler", "cfgs", "steps", "filename", "negative_prompt", "sd_model_name", "sd_model_hash")
_NUM_OLD_COLUMNS = 9
"""The columns that A1111's logs have always had; the model column came later."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}


class PictureSaver:
    """Saves pictures of one tab's gallery to the folder of saved pictures."""

    def __init__(self, app: Application, tab: str) -> None:
        self.app = app
        self.tab = tab

    @property
    def folder(self) -> Path:
        return Path(self.app.options.outdir_save)

    def save(self, gallery: Sequence[Any] | None, generation_info: str, picture_index: float) -> tuple[Any, str]:
        """Copy the selected picture; all of them if the option says so or none is selected. Returns the files and a line for the log."""
        only_selected = self.app.options.save_selected_only and picture_index >= 0
        indices = [int(picture_index)] if only_selected else list(range(len(gallery or [])))
        try:
            sources = self._pictures(gallery, indices)
        except RequestError as error:
            return gr.update(visible=False), error_html(str(error))
        try:
            saved = [self._copy(source) for source in sources]
            if self.app.options.save_write_log_csv:
                self._append_to_log(generation_info, saved[0])
        except OSError as error:
            return gr.update(visible=False), error_html(f"The picture could not be saved: {error}")
        return gr.update(value=[str(path) for path in saved], visible=True), plaintext_to_html(
            f"Saved: {', '.join(path.name for path in saved)} in {self.folder}"
        )

    def save_zip(self, gallery: Sequence[Any] | None, generation_info: str, picture_index: float) -> tuple[Any, str]:
        """Zip all pictures of the gallery into the same folder."""
        try:
            pictures = self._pictures(gallery, range(len(gallery or [])))
        except RequestError as error:
            return gr.update(visible=False), error_html(str(error))
        name = f"{datetime.now().strftime('%Y-%m-%d-%H%M%S')}-{self.tab}.zip"

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w") as archive:
                for number, picture in enumerate(pictures):
                    archive.write(picture, f"{number:02d}-{self.name_of(picture)}")

        try:
            target = write_whole(write, numbered_names(self.folder / name))
        except OSError as error:
            return gr.update(visible=False), error_html(f"The pictures could not be saved: {error}")
        return gr.update(value=[str(target)], visible=True), plaintext_to_html(f"Saved: {target.name} in {self.folder}")

    def _pictures(self, gallery: Sequence[Any] | None, indices: Sequence[int]) -> list[Path]:
        """The gallery's pictures with these indices. Raises RequestError if there is none, or if the page did not make one of them."""
        named = [file for index in indices if (file := picture_at(gallery, index))]
        if not named:
            raise RequestError("There is no picture to save yet.")
        return [self.find(file) for file in named]

    def find(self, path: str) -> Path:
        """The picture named by the browser. Raises RequestError unless this program made it."""
        return picture_of_page(path, self.app.config.outputs_dir)

    def name_of(self, picture: Path) -> str:
        """The preferred file name for the copy, if it is free."""
        return picture.name

    def _copy(self, source: Path) -> Path:
        with source.open("rb") as picture:
            return write_whole(lambda file: shutil.copyfileobj(picture, file), numbered_names(self.folder / self.name_of(source)))

    def _append_to_log(self, generation_info: str, picture: Path) -> None:
        info = read_generation_info(generation_info)
        values = {**info, "sampler": info.get("sampler_name"), "cfgs": info.get("cfg_scale"), "filename": picture.name}
        file = next(name for name in numbered_names(self.folder / "log.csv") if not name.exists() or _is_log(name))
        text = io.StringIO()
        writer = csv.writer(text)
        if not file.exists():
            writer.writerow(LOG_COLUMNS)
        elif not file.read_bytes().endswith(b"\n"):
            text.write("\n")
        writer.writerow([values.get(column, "") for column in LOG_COLUMNS])
        append_text(file, text.getvalue())

    def open_folder(self) -> None:
        """Open this tab's picture folder in the file manager of the server's machine."""
        options = self.app.options
        folder = Path(options.outdir_samples or getattr(options, f"outdir_{self.tab}_samples"))
        if not folder.is_dir():
            gr.Info(f"There is no folder {folder} yet; the first picture creates it.")
            return
        try:
            subprocess.Popen([file_manager(), str(folder)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError:
            gr.Info(f"The folder is {folder}; no file manager could be started on the server.")


def file_manager() -> str:
    """The program that opens folders on this system."""
    return {"win32": "explorer", "darwin": "open"}.get(sys.platform, "xdg-open")


class GuestPictureSaver(PictureSaver):
    """For galleries of extensions, whose pictures gradio stores among the uploads. They are renamed, and must really be pictures."""

    def find(self, path: str) -> Path:
        found = file_below(path, [Path(get_upload_folder())])
        if found is None or found.suffix.lower() not in PICTURE_SUFFIXES:
            return super().find(path)
        try:
            with Image.open(found) as picture:
                picture.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # whatever the image reader raises
            raise ForeignFileError(f"{found.name!r} is not a picture and was not saved.") from error
        return found

    def name_of(self, picture: Path) -> str:
        is_own = file_below(picture, [self.app.config.outputs_dir]) is not None
        return picture.name if is_own else f"{self.tab}{picture.suffix.lower()}"


def connect_saving(saver: PictureSaver, output: OutputPanel) -> None:
    index = gr.Number(value=-1, visible="hidden", elem_id=f"{saver.tab}_save_index")
    js = "(gallery, info, index) => [gallery, info, selected_gallery_index()]"
    for button, function in ((output.buttons["save"], saver.save), (output.buttons["zip"], saver.save_zip)):
        button.click(
            function, js=js, inputs=[output.gallery, output.generation_info, index], outputs=[output.download_files, output.html_log], **QUIET
        )
    output.buttons["open_folder"].click(saver.open_folder, **QUIET)


def _is_log(file: Path) -> bool:
    """Whether the file is a log of saved pictures (ours, or A1111's with fewer columns), so that rows may be appended."""
    try:
        if not file.is_file():
            return False
        with file.open("rb") as log_file:
            first = log_file.readline(2**16).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    return tuple(first.strip().split(","))[:_NUM_OLD_COLUMNS] == LOG_COLUMNS[:_NUM_OLD_COLUMNS]


def save_files(js_data: str, images: Sequence[Any] | None, do_make_zip: bool, index: float) -> tuple[Any, str]:
    """Like the buttons below a gallery; for extensions that have their own gallery. Returns the files and a line for the log."""
    from modules.application import current_application  # extensions call this without an application

    saver = GuestPictureSaver(current_application(), "txt2img")
    return saver.save_zip(images, js_data, index) if do_make_zip else saver.save(images, js_data, index)
