"""From a click on Generate to the pictures on the page: the job and its result, interrupt and skip, and reconnecting to a job after a reload.

Must not know the controls of any tab, nor how a picture is made. A tab passes two functions: one builds the request, one runs it.
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
    from modules.jobs.state import State

log = logging.getLogger(__name__)

POLL_S = 0.05
PNG_TEXT_KEY = "parameters"

BuildRequest = Callable[[Mapping[str, Any]], Any]
"""Builds the request for `ProcessRequest` from a tab's named control values. Raises RequestError for values that cannot make a picture."""
ProcessRequest = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of a generation handler; `outputs` gives it in the order of the handler's outputs."""

    gallery: Any
    generation_info: Any
    infotext: Any
    html_log: str

    def outputs(self) -> tuple[Any, Any, Any, str]:
        return self.gallery, self.generation_info, self.infotext, self.html_log


def failure(message: str) -> Answer:
    """An answer that leaves the pictures unchanged and reports the error in the log under the gallery and in a toast."""
    show_note(message, title="Error")
    return Answer(gallery=gr.skip(), generation_info=gr.skip(), infotext=gr.skip(), html_log=error_html(message))


def show_note(message: str, *, title: str) -> None:
    """Show a toast; does nothing outside a page event."""
    if LocalContext.event_id.get(None) is not None:
        gr.Warning(html.escape(message), title=title, duration=12)


def explain(error: BaseException) -> str:
    """`error` as text for the page: the message if the error is meant for the user, else its type and where to look."""
    if isinstance(error, RequestError):
        return str(error)
    text = str(error).strip() or "no further details"
    return f"The picture could not be made: {text} ({type(error).__name__}; see the server's log for details)"


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min. {rest:.1f} sec." if minutes else f"{rest:.1f} sec."


def performance_html(seconds: float) -> str:
    """The line that shows how long a job took."""
    return f"<div class='performance'><p class='time'>Time taken: <span class='measurement'>{format_duration(seconds)}</span></p></div>"


class GalleryFiles:
    """Provides a servable file for every picture of a result, with its parameters: the saved file, else a PNG in a temporary folder."""

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
            gr.set_static_paths([self._temp_dir])  # served from there: if gradio copied them, they would look like uploads
        data = PngImagePlugin.PngInfo()
        if infotext:
            data.add_text(PNG_TEXT_KEY, infotext)
        content = io.BytesIO()
        image.save(content, format="PNG", pnginfo=data)
        path = self._temp_dir / f"{secrets.token_hex(8)}.png"
        replace_content(path, content.getvalue())
        return str(path)


def answer_of(processed: Any, files: GalleryFiles, *, seconds: float | None, show_images: bool = True) -> Answer:
    """`processed` as the page shows it, with the first picture selected."""
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


def insert_in_gallery(gallery: Sequence[Any] | None, generation_info: str, picture_index: float, answer: Answer, *, keep_old: bool) -> Answer:
    """`answer` with its picture inserted into the gallery on the page: in place of its source picture, or after it if `keep_old`.

    The caller has verified that the gallery's pictures belong to the page."""
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
    """The job's result, without occupying a thread while the job waits in the queue. Raises what the job raised."""
    while not job.done.is_set():
        await asyncio.sleep(POLL_S)
    return job.wait(0)


class GenerateHandler:
    """The handler of a tab's Generate button. Called with input values in the order of `names`, preceded by the task id."""

    def __init__(self, app: Application, tab: str, names: Sequence[str], build: BuildRequest, process: ProcessRequest) -> None:
        self.app = app
        self.tab = tab
        self.names = tuple(names)
        self.build = build
        self.process = process
        self.files = GalleryFiles([app.config.outputs_dir])

    async def generate(self, task_id: str, *values: Any) -> tuple[Any, Any, Any, str]:
        """Queue the job, wait for it, and answer with its pictures, or with the reason there are none."""
        return (await self._run(task_id, dict(zip(self.names, values)))).outputs()

    async def upscale(self, task_id: str, picture_index: float, gallery: Any, generation_info: str, *values: Any) -> tuple[Any, Any, Any, str]:
        """Like generate(), but starts from a gallery picture; the result replaces it there."""
        shown = {"picture_index": picture_index, "gallery": gallery, "generation_info": generation_info}
        try:
            paths = [str(path) for path in pictures_of_page(gallery, self.app.config.outputs_dir)]
        except RequestError as error:
            return failure(str(error)).outputs()
        answer = await self._run(task_id, {**dict(zip(self.names, values)), **shown})
        if isinstance(answer.generation_info, str):
            keep_old = self.app.options.hires_button_gallery_insert
            answer = insert_in_gallery(paths, generation_info, picture_index, answer, keep_old=keep_old)
        return answer.outputs()

    async def _run(self, task_id: str, values: Mapping[str, Any]) -> Answer:
        started = time.perf_counter()
        with keeping_errors() as kept:
            processed = await wait_for_job(self._submit(task_id, values))
            answer = await self._answer(processed, time.perf_counter() - started)
        error = kept.take()
        return answer if error is None else self._failed(error)

    def _submit(self, task_id: str, values: Mapping[str, Any]) -> Job[Any]:
        """Queue the job that these control values ask for."""
        request = self.build(values)
        return self.app.jobs.submit(
            task_id or None,
            self.tab,
            lambda: self.process(request),
            request=request,
            label=str(values.get("prompt") or ""),
            repeat=lambda again: self._submit(again, values),
        )

    def enqueue(self, task_id: str, *values: Any) -> str:
        """Queue the job without waiting for it; returns an HTML line that says so. Its pictures are saved, and are in the history."""
        with keeping_errors() as kept:
            job = self._submit(task_id, dict(zip(self.names, values)))
        error = kept.take()
        if error is not None:
            return self._failed(error).html_log
        place = self.app.jobs.num_waiting
        return plaintext_to_html(f"Job {job.number} is in the queue; {place} waiting." if place else f"Job {job.number} has begun.")

    def _failed(self, error: Exception) -> Answer:
        """The job worker has logged what happened inside a job."""
        if isinstance(error, JobCancelled):
            return Answer(gallery=gr.skip(), generation_info=gr.skip(), infotext=gr.skip(), html_log=plaintext_to_html(str(error)))
        if isinstance(error, RequestError):
            return failure(str(error))
        log.error("%s failed: %s: %s", self.tab, type(error).__name__, error)
        return failure(explain(error))

    async def restore(self, task_id: str) -> tuple[Any, Any, Any, str]:
        """The answer of a job started before the page was reloaded; waits while the job runs."""
        tasks = self.app.jobs.tasks
        while task_id and tasks.is_live(task_id):
            await asyncio.sleep(POLL_S)
        processed = tasks.wait_for_result(task_id, 0) if task_id else None
        if processed is None:
            return failure("That job has ended and its pictures are no longer in memory. Saved pictures are in the output folder.").outputs()
        return (await self._answer(processed, None)).outputs()

    async def _answer(self, processed: Any, seconds: float | None) -> Answer:
        show = not self.app.options.do_not_show_images
        return await asyncio.to_thread(answer_of, processed, self.files, seconds=seconds, show_images=show)


class JobControl:
    """Interrupt and Skip. A queued job is removed; a running one ends within a step, or after its batch if the option says so."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def interrupt(self, task_id: str) -> None:
        if task_id and self.app.jobs.cancel(task_id):
            return
        state = self._state(task_id)
        several = state.job_count > 1 and state.job_no + 1 < state.job_count
        if self.app.options.interrupt_after_current and several and not state.stopping_generation:
            state.stop_generating()
        else:
            state.interrupt()

    async def interrupt_now(self, task_id: str = "") -> None:
        self._state(task_id).interrupt()

    async def skip(self, task_id: str = "") -> None:
        self._state(task_id).skip()

    def _state(self, task_id: str) -> State:
        """The state of the page's own job: on the front of a cluster others run at the same time."""
        return self.app.state.of_job(task_id) if task_id else self.app.state
