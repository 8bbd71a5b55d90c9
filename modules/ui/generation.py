"""From a click on Generate to the pictures on the page: the job and its result, interrupt and skip, and finding a job again after a reload.

Must not know the controls of any tab, nor how a picture is made: a tab hands in a function that builds the request, and one that carries it out.
"""

from __future__ import annotations

import asyncio
import html
import io
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.context import LocalContext
from PIL import Image, PngImagePlugin

from backend.unfinished_files import replace_content
from modules.errors import JobCancelled, RequestError
from modules.jobs.queue import keeping_errors
from modules.ui.page_files import PICTURE_SUFFIXES, new_gallery_folder, pictures_of_page
from modules.ui.shown_text import error_html, picture_at, plaintext_to_html, read_generation_info

if TYPE_CHECKING:
    from modules.application import Application
    from modules.jobs.queue import Job, keeping_errors

log = logging.getLogger(__name__)

POLL_S = 0.05
PNG_TEXT_KEY = "parameters"

BuildRequest = Callable[[Mapping[str, Any]], Any]
"""Named values of a tab's controls to a request that `ProcessRequest` takes. Raises RequestError for values that make no picture."""
ProcessRequest = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a generation handler gives back, in the order of its outputs."""

    gallery: Any
    generation_info: Any
    infotext: Any
    html_log: str

    def outputs(self) -> tuple[Any, Any, Any, str]:
        return self.gallery, self.generation_info, self.infotext, self.html_log


def failure(message: str) -> Answer:
    """An answer that leaves the pictures as they are and says what went wrong: in the log, and in a note at the corner of the page."""
    show_note(message, title="Error")
    return Answer(gallery=gr.skip(), generation_info=gr.skip(), infotext=gr.skip(), html_log=error_html(message))


def show_note(message: str, *, title: str) -> None:
    """A note at the corner of the page; nothing outside of a page's event."""
    if LocalContext.event_id.get(None) is not None:
        gr.Warning(html.escape(message), title=title, duration=12)


def explain(error: BaseException) -> str:
    """`error` in words for the page: the message of an error that is meant for the user, else its kind and where to look."""
    if isinstance(error, RequestError):
        return str(error)
    text = str(error).strip() or "no further details"
    return f"The picture could not be made: {text} ({type(error).__name__}; the log of the server has the details)"


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min. {rest:.1f} sec." if minutes else f"{rest:.1f} sec."


def performance_html(seconds: float) -> str:
    """The line that says how long a job took."""
    return f"<div class='performance'><p class='time'>Time taken: <span class='measurement'>{format_duration(seconds)}</span></p></div>"


class GalleryFiles:
    """Gives every picture of a result a file that the page may load, with its parameters: the saved file, else a PNG in a temporary folder."""

    def __init__(self, served_dirs: Sequence[Path]) -> None:
        self.served_dirs = tuple(path.resolve() for path in served_dirs)
        self._temp_dir: Path | None = None

    def file_for(self, image: Image.Image, infotext: str) -> str:
        saved = getattr(image, "already_saved_as", None)
        if isinstance(saved, str) and self._may_be_served(Path(saved)):
            return saved
        return self._write(image, infotext)

    def _may_be_served(self, path: Path) -> bool:
        path = path.resolve()
        return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file() and any(path.is_relative_to(folder) for folder in self.served_dirs)

    def _write(self, image: Image.Image, infotext: str) -> str:
        if self._temp_dir is None:
            self._temp_dir = new_gallery_folder(self)
            gr.set_static_paths([self._temp_dir])  # shown from there; copied first, they could not be told from uploads
        data = PngImagePlugin.PngInfo()
        if infotext:
            data.add_text(PNG_TEXT_KEY, infotext)
        content = io.BytesIO()
        image.save(content, format="PNG", pnginfo=data)
        path = self._temp_dir / f"{secrets.token_hex(8)}.png"
        replace_content(path, content.getvalue())
        return str(path)


def answer_of(processed: Any, files: GalleryFiles, *, seconds: float | None, show_images: bool = True) -> Answer:
    """`processed` as the page shows it. The first picture is selected."""
    images = list(processed.images) if show_images else []
    infotexts = list(processed.infotexts or [])
    texts = [infotexts[index] if index < len(infotexts) else processed.info for index in range(len(images))]
    paths = [files.file_for(image, text) for image, text in zip(images, texts)]
    log_parts = [plaintext_to_html(processed.comments.strip(), "comments")] if processed.comments and processed.comments.strip() else []
    if seconds is not None:
        log_parts.append(performance_html(seconds))
    info = texts[0] if texts else (processed.info or "")
    return Answer(
        gallery=gr.update(value=paths, selected_index=0 if paths else None),
        generation_info=processed.js(),
        infotext=plaintext_to_html(info, "infotext") if info else "",
        html_log="".join(log_parts),
    )


def put_beside(gallery: Sequence[Any] | None, generation_info: str, picture_index: float, answer: Answer, *, keep_old: bool) -> Answer:
    """`answer` with its picture put into the gallery that was shown: in the place of the picture it was made from, or behind it with `keep_old`.

    The caller has made sure that the gallery's pictures are those of the page."""
    old_info, new_info = read_generation_info(generation_info), read_generation_info(answer.generation_info)
    paths = [picture_at(gallery, index) for index in range(len(gallery or []))]
    texts = list(old_info.get("infotexts") or [])
    new_paths, new_texts = answer.gallery.get("value") or [], list(new_info.get("infotexts") or [])
    if not paths or not new_paths or len(texts) != len(paths):
        return answer
    place = min(max(int(picture_index), 0), len(paths) - 1)
    first = place + 1 if keep_old else place
    merged_info = {**old_info, "infotexts": [*texts[:first], *new_texts, *texts[place + 1 :]]}
    return Answer(
        gallery=gr.update(value=[*paths[:first], *new_paths, *paths[place + 1 :]], selected_index=first),
        generation_info=json.dumps(merged_info),
        infotext=answer.infotext,
        html_log=answer.html_log,
    )


async def wait_for_job(job: Job[Any]) -> Any:
    """The job's result, without holding a thread while it waits in the line. Raises what the job raised."""
    while not job.done.is_set():
        await asyncio.sleep(POLL_S)
    return job.wait(0)


class GenerateHandler:
    """The handler behind a tab's Generate button. Called with the values of its inputs in the order of `names`, the task id first."""

    def __init__(self, app: Application, tab: str, names: Sequence[str], build: BuildRequest, process: ProcessRequest) -> None:
        self.app = app
        self.tab = tab
        self.names = tuple(names)
        self.build = build
        self.process = process
        self.files = GalleryFiles([app.config.outputs_dir])

    async def generate(self, task_id: str, *values: Any) -> tuple[Any, Any, Any, str]:
        """Queue the job, wait for it, answer with its pictures; with the reason in the log when there are none."""
        return (await self._run(task_id, dict(zip(self.names, values)))).outputs()

    async def upscale(self, task_id: str, picture_index: float, gallery: Any, generation_info: str, *values: Any) -> tuple[Any, Any, Any, str]:
        """As generate(), from a picture of the gallery; the result takes its place there."""
        shown = {"picture_index": picture_index, "gallery": gallery, "generation_info": generation_info}
        try:
            paths = [str(path) for path in pictures_of_page(gallery, self.app.config.outputs_dir)]
        except RequestError as error:
            return failure(str(error)).outputs()
        answer = await self._run(task_id, {**dict(zip(self.names, values)), **shown})
        if isinstance(answer.generation_info, str):
            keep_old = self.app.options.hires_button_gallery_insert
            answer = put_beside(paths, generation_info, picture_index, answer, keep_old=keep_old)
        return answer.outputs()

    async def _run(self, task_id: str, values: Mapping[str, Any]) -> Answer:
        started = time.perf_counter()
        with keeping_errors() as kept:
            request = self.build(values)
            job = self.app.jobs.submit(task_id or None, self.tab, lambda: self.process(request))
            processed = await wait_for_job(job)
            answer = await self._answer(processed, time.perf_counter() - started)
        error = kept.take()
        return answer if error is None else self._failed(error)

    def _failed(self, error: Exception) -> Answer:
        """The job worker has logged what happened inside a job."""
        if isinstance(error, JobCancelled):
            return Answer(gallery=gr.skip(), generation_info=gr.skip(), infotext=gr.skip(), html_log=plaintext_to_html(str(error)))
        if isinstance(error, RequestError):
            return failure(str(error))
        log.error("%s failed: %s: %s", self.tab, type(error).__name__, error)
        return failure(explain(error))

    async def restore(self, task_id: str) -> tuple[Any, Any, Any, str]:
        """The answer of a job that was started before the page was loaded again; waits while it runs."""
        tasks = self.app.jobs.tasks
        while task_id and tasks.is_live(task_id):
            await asyncio.sleep(POLL_S)
        processed = tasks.wait_for_result(task_id, 0) if task_id else None
        if processed is None:
            return failure("That job is over and its pictures are not at hand any more; those that were saved are in the output folder.").outputs()
        return (await self._answer(processed, None)).outputs()

    async def _answer(self, processed: Any, seconds: float | None) -> Answer:
        show = not self.app.options.do_not_show_images
        return await asyncio.to_thread(answer_of, processed, self.files, seconds=seconds, show_images=show)


class JobControl:
    """Interrupt and Skip. A waiting job is taken out of the line; the running one ends within a step, or after its batch if the option says so."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def interrupt(self, task_id: str) -> None:
        if task_id and self.app.jobs.cancel(task_id):
            return
        state = self.app.state
        several = state.job_count > 1 and state.job_no + 1 < state.job_count
        if self.app.options.interrupt_after_current and several and not state.stopping_generation:
            state.stop_generating()
        else:
            state.interrupt()

    async def interrupt_now(self) -> None:
        self.app.state.interrupt()

    async def skip(self) -> None:
        self.app.state.skip()
