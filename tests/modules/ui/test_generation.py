from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from modules.application import Application
from modules.errors import RequestError
from modules.pictures.metadata import read_info_from_image
from modules.ui import generation
from modules.ui.generation import Answer, GalleryFiles, GenerateHandler, JobControl
from tests.support.applications import installed_application

INFOTEXT = "a cat\nSteps: 4, Sampler: Euler, Seed: 1, Size: 8x8"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def picture(color: tuple[int, int, int] = (10, 20, 30)) -> Image.Image:
    return Image.new("RGB", (8, 8), color)


def result(*images: Image.Image, **fields: Any) -> SimpleNamespace:
    """A job's result."""
    values = {
        "images": list(images),
        "infotexts": [INFOTEXT] * len(images),
        "info": INFOTEXT,
        "comments": "",
        "js": lambda: json.dumps({"infotexts": [INFOTEXT]}),
    }
    return SimpleNamespace(**values | fields)


def handler(app: Application, process: Any, build: Any = None) -> GenerateHandler:
    return GenerateHandler(app, "txt2img", ("prompt", "steps"), build or (lambda values: values), process)


def run(coroutine: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:  # a browser test in this process leaves an event loop running in this thread
        return pool.submit(asyncio.run, coroutine).result()


def test_values_reach_the_request_by_name_and_pictures_come_back(app: Application) -> None:
    seen: list[Any] = []

    def process(request: Any) -> Any:
        seen.append(request)
        return result(picture())

    gallery, info, infotext, log = run(handler(app, process).generate("task(1)", "a cat", 4))
    assert seen == [{"prompt": "a cat", "steps": 4}]
    assert gallery["selected_index"] == 0
    with Image.open(gallery["value"][0]) as shown:
        assert shown.getpixel((0, 0)) == (10, 20, 30)
        assert read_info_from_image(shown)[0] == INFOTEXT
    assert json.loads(info)["infotexts"] == [INFOTEXT]
    assert infotext.startswith("<p class='infotext'>a cat")
    assert "Time taken" in log
    assert app.jobs.tasks.finished == ["task(1)"]


def test_saved_files_are_shown_as_they_are_when_the_page_may_load_them(app: Application, tmp_path: Path) -> None:
    outputs = app.config.outputs_dir
    outputs.mkdir(parents=True)
    inside, outside = picture(), picture()
    inside.save(outputs / "a.png")
    inside.already_saved_as = str(outputs / "a.png")  # type: ignore[attr-defined]
    outside.save(tmp_path / "b.png")
    outside.already_saved_as = str(tmp_path / "b.png")  # type: ignore[attr-defined]
    files = GalleryFiles([outputs])
    assert files.file_for(inside, INFOTEXT) == str(outputs / "a.png")
    assert files.file_for(outside, INFOTEXT) != str(tmp_path / "b.png")


def test_formats_that_no_browser_shows_get_a_copy(app: Application) -> None:
    outputs = app.config.outputs_dir
    outputs.mkdir(parents=True)
    image = picture()
    image.save(outputs / "a.tiff")
    image.already_saved_as = str(outputs / "a.tiff")  # type: ignore[attr-defined]
    assert GalleryFiles([outputs]).file_for(image, "").endswith(".png")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RequestError("steps: 0 is too few; ask for 1 or more."), "steps: 0 is too few; ask for 1 or more."),
        (RuntimeError("sizes <differ>"), "The picture could not be made: sizes &lt;differ&gt; (RuntimeError"),
        (KeyError(), "no further details (KeyError"),
    ],
)
def test_errors_of_a_job_are_told_in_words_and_leave_the_pictures(app: Application, error: Exception, shown: str) -> None:
    def process(_: Any) -> Any:
        raise error

    gallery, info, infotext, log = run(handler(app, process).generate("task(1)", "x", 1))
    assert [gallery, info, infotext] == [gr.skip()] * 3
    assert shown in log
    assert "Traceback" not in log


def test_errors_in_the_values_are_told_without_a_job(app: Application) -> None:
    def build(_: Any) -> Any:
        raise RequestError("put a picture into the field above")

    outputs = run(handler(app, lambda request: result(), build).generate("task(1)", "x", 1))
    assert "put a picture into the field above" in outputs[3]
    assert app.jobs.tasks.finished == []


def test_option_hides_pictures(app: Application) -> None:
    app.options.set("do_not_show_images", True)
    gallery, _, infotext, _ = run(handler(app, lambda request: result(picture())).generate("task(1)", "x", 1))
    assert gallery["value"] == []
    assert "a cat" in infotext


def test_comments_of_the_job_are_shown_escaped(app: Application) -> None:
    log = run(handler(app, lambda request: result(picture(), comments="<b>cut</b>")).generate("task(1)", "x", 1))[3]
    assert "&lt;b&gt;cut&lt;/b&gt;" in log


def test_job_is_found_again_after_a_reload(app: Application) -> None:
    may_end = threading.Event()

    def process(_: Any) -> Any:
        may_end.wait(10)
        return result(picture())

    one = handler(app, process)

    async def reload_while_it_runs() -> Any:
        first = asyncio.create_task(one.generate("task(1)", "x", 1))
        while not app.jobs.tasks.is_live("task(1)"):
            await asyncio.sleep(0.01)
        second = asyncio.create_task(one.restore("task(1)"))
        await asyncio.sleep(0)
        may_end.set()
        return await first, await second

    first, second = run(reload_while_it_runs())
    assert len(second[0]["value"]) == len(first[0]["value"]) == 1
    assert "Time taken" not in second[3]


def test_unknown_job_cannot_be_restored(app: Application) -> None:
    assert "no longer in memory" in run(handler(app, lambda request: None).restore("task(gone)"))[3]


def test_waiting_job_is_taken_out_of_the_line(app: Application) -> None:
    may_end, started = threading.Event(), threading.Event()

    def process(_: Any) -> Any:
        started.set()
        may_end.wait(10)
        return result(picture())

    one, control = handler(app, process), JobControl(app)

    async def cancel_the_second() -> Any:
        first = asyncio.create_task(one.generate("task(1)", "x", 1))
        while not started.is_set():
            await asyncio.sleep(0.01)
        second = asyncio.create_task(one.generate("task(2)", "x", 1))
        while "task(2)" not in app.jobs.tasks.pending:
            await asyncio.sleep(0.01)
        await control.interrupt("task(2)")
        answer = await second
        interrupted = app.state.interrupted
        may_end.set()
        await first
        return answer, interrupted

    answer, interrupted = run(cancel_the_second())
    assert "canceled before it started" in answer[3]
    assert not interrupted


def test_interrupt_lets_the_picture_finish_first_and_stops_at_once_the_second_time(app: Application) -> None:
    control = JobControl(app)
    app.state.begin("txt2img")
    app.state.job_count, app.state.job_no = 3, 0
    run(control.interrupt(""))
    assert (app.state.stopping_generation, app.state.interrupted) == (True, False)
    run(control.interrupt(""))
    assert app.state.interrupted


@pytest.mark.parametrize(("count", "number", "after_current"), [(1, 0, True), (3, 2, True), (3, 0, False)])
def test_interrupt_stops_at_once_when_nothing_follows_or_the_option_says_so(app: Application, count: int, number: int, after_current: bool) -> None:
    app.options.set("interrupt_after_current", after_current)
    app.state.begin("txt2img")
    app.state.job_count, app.state.job_no = count, number
    run(JobControl(app).interrupt(""))
    assert (app.state.stopping_generation, app.state.interrupted) == (False, True)


def test_skip_ends_the_batch(app: Application) -> None:
    run(JobControl(app).skip())
    assert (app.state.skipped, app.state.interrupted) == (True, False)


def answer(path: str, text: str) -> Answer:
    return Answer(gallery=gr.update(value=[path]), generation_info=json.dumps({"infotexts": [text]}), infotext="", html_log="")


@pytest.mark.parametrize(
    ("keep_old", "paths", "texts", "selected"),
    [(False, ["a", "new", "c"], ["A", "New", "C"], 1), (True, ["a", "b", "new", "c"], ["A", "B", "New", "C"], 2)],
)
def test_upscaled_picture_takes_its_place_in_the_gallery(keep_old: bool, paths: list[str], texts: list[str], selected: int) -> None:
    shown = json.dumps({"infotexts": ["A", "B", "C"], "all_seeds": [1, 2, 3]})
    merged = generation.insert_in_gallery([("a", None), ("b", None), ("c", None)], shown, 1, answer("new", "New"), keep_old=keep_old)
    assert (merged.gallery["value"], merged.gallery["selected_index"]) == (paths, selected)
    assert json.loads(merged.generation_info) == {"infotexts": texts, "all_seeds": [1, 2, 3]}


def test_upscaled_picture_stands_alone_when_the_gallery_is_not_known() -> None:
    alone = answer("new", "New")
    assert generation.insert_in_gallery([("a", None)], "{}", 0, alone, keep_old=False) is alone
    assert generation.insert_in_gallery(None, "{}", 0, alone, keep_old=False) is alone


def test_durations_are_written_in_minutes_and_seconds() -> None:
    assert generation.format_duration(3.25) == "3.2 sec."
    assert generation.format_duration(125.04) == "2 min. 5.0 sec."
