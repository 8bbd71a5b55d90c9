"""The Extras tab from control values to files and gallery, through the job queue, without a browser."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image, PngImagePlugin

from modules.application import Application
from modules.errors import RequestError
from modules.pictures.metadata import read_info_from_image
from modules.pictures.postprocessing_jobs import ExtrasJob, ExtrasRequest, joined_caption
from modules.scripts.postprocessing import Operation, PostprocessedImage, ScriptPostprocessing
from modules.ui.extras import ExtrasTab, build_extras, carry_out, create_extras_tab
from modules.ui.generation import GenerateHandler
from tests.support.applications import installed_application
from tests.support.narrow_application import gradient

TEXT = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 16x12"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        app.options.save_to_dirs = False
        yield app


@pytest.fixture
def tab(app: Application) -> ExtrasTab:
    with gr.Blocks(analytics_enabled=False):
        return create_extras_tab(app)


def values_of(tab: ExtrasTab, **changes: Any) -> dict[str, Any]:
    """What the tab sends if only `changes` (by name of an input, or of the upscale operation's control) were touched."""
    values = {name: control.value for name, control in tab.inputs.items()}
    upscale = list(tab.runner.scripts[0].controls or ())
    for name, value in changes.items():
        values[name if name in values else f"operation_{upscale.index(name)}"] = value
    return values


def put_picture(path: Path, text: str | None = TEXT) -> str:
    info = PngImagePlugin.PngInfo()
    if text:
        info.add_text("parameters", text)
    info.add_text("note", "mine")
    gradient(16, 12).save(path, pnginfo=info)
    return str(path)


def run(app: Application, tab: ExtrasTab, **changes: Any) -> Any:
    job = build_extras(app, tab.runner, values_of(tab, **changes))
    return app.jobs.submit("task(x)", "extras", lambda: carry_out(job)).wait(60)


def saved(app: Application) -> list[Path]:
    return sorted(Path(app.options.outdir_extras_samples).rglob("*.png"))


def test_one_picture_with_what_its_file_said(app: Application, tab: ExtrasTab, tmp_path: Path) -> None:
    processed = run(app, tab, image=put_picture(tmp_path / "a.png"), upscaler_1_name="Lanczos")
    expected = f"{TEXT}, Postprocess upscale by: 4, Postprocess upscaler: Lanczos"
    assert [image.size for image in processed.images] == [(64, 48)]
    assert processed.infotexts == [expected]
    (file,) = saved(app)
    with Image.open(file) as image:
        text, items = read_info_from_image(image)
    assert text == expected
    assert items["note"] == "mine"
    assert items["postprocessing"] == "Postprocess upscale by: 4, Postprocess upscaler: Lanczos"


def _run(coroutine: Any) -> Any:
    """On its own thread, because a browser test may have left its event loop on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def test_the_handler_of_the_page_answers_with_a_gallery(app: Application, tab: ExtrasTab, tmp_path: Path) -> None:
    handler = GenerateHandler(app, "extras", tuple(tab.inputs), lambda values: build_extras(app, tab.runner, values), carry_out)
    values = values_of(tab, image=put_picture(tmp_path / "a.png"), upscaler_1_name="Nearest")
    gallery, _, infotext, log = _run(handler.generate("task(y)", *values.values()))
    assert len(gallery["value"]) == 1
    assert "Postprocess upscaler: Nearest" in infotext
    assert "Time taken" in log
    _, _, _, log = _run(handler.generate("task(z)", *values_of(tab).values()))
    assert "Extras needs a picture" in log


def test_several_keep_their_names_and_one_that_cannot_be_read_is_named(app: Application, tab: ExtrasTab, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no picture", encoding="utf8")
    files = [put_picture(tmp_path / "a.png"), str(tmp_path / "broken.png"), put_picture(tmp_path / "b.png", None)]
    processed = run(app, tab, mode=1, files=files, upscaler_1_name="Nearest", upscale_by=2)
    assert [path.name for path in saved(app)] == ["a.png", "b.png"]
    assert "broken.png could not be read" in processed.comments
    with pytest.raises(RequestError, match="No picture could be read"):
        run(app, tab, mode=1, files=[str(tmp_path / "broken.png")])


def test_a_folder_into_a_folder(app: Application, tab: ExtrasTab, tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a.png", "b.png"):
        put_picture(source / name)
    folders = {"mode": 2, "input_dir": str(source), "output_dir": str(output)}
    processed = run(app, tab, **folders, upscaler_1_name="Nearest", show_results=False)
    assert (processed.images, sorted(path.name for path in output.iterdir())) == ([], ["a.png", "b.png"])
    assert len(run(app, tab, **folders, upscaler_1_name="Nearest").images) == 2
    assert saved(app) == []
    before = {path: path.read_bytes() for path in source.iterdir()}
    run(app, tab, **{**folders, "output_dir": str(source)}, upscaler_1_name="Nearest")
    assert len(list(source.iterdir())) == 4
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Extras needs a picture"),
        ({"mode": 1}, "upload some"),
        ({"mode": 2}, "name one"),
        ({"mode": 2, "input_dir": "/nowhere/at/all"}, "does not exist"),
    ],
)
def test_missing_pictures_are_asked_for(app: Application, tab: ExtrasTab, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        build_extras(app, tab.runner, values_of(tab, **changes))


def test_folders_of_the_server_can_be_forbidden(tmp_path: Path) -> None:
    with installed_application(tmp_path / "data", hide_ui_dir_config=True) as app:
        with gr.Blocks(analytics_enabled=False):
            tab = create_extras_tab(app)
        with pytest.raises(RequestError, match="--hide-ui-dir-config"):
            build_extras(app, tab.runner, values_of(tab, mode=2, input_dir="/etc"))


def test_nothing_is_saved_where_saving_is_off(app: Application, tab: ExtrasTab, tmp_path: Path) -> None:
    app.options.samples_save = False
    assert len(run(app, tab, image=put_picture(tmp_path / "a.png"), upscaler_1_name="Nearest").images) == 1
    assert saved(app) == []


@pytest.mark.parametrize("kind", ["a file", "below a file", "a NUL", "read-only", "too long"])
def test_a_folder_that_cannot_be_written_costs_the_file_not_the_picture(
    app: Application, tab: ExtrasTab, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    names = {"a file": "file", "below a file": "file/sub", "a NUL": "x\0y", "read-only": "closed", "too long": "x" * 300}
    if kind == "read-only":
        make = Path.mkdir

        def refuse(self: Path, *args: Any, **fields: Any) -> None:
            if self.name == "closed":
                raise PermissionError(13, "Permission denied", str(self))
            make(self, *args, **fields)

        monkeypatch.setattr(Path, "mkdir", refuse)
    app.options.data["outdir_extras_samples"] = str(tmp_path / names[kind])
    paths = [Path(put_picture(tmp_path / f"{name}.png")) for name in "ab"]
    processed = ExtrasJob(app, ExtrasRequest(paths=paths, operations=[], shows_results=False)).run()
    assert [image.size for image in processed.images] == [(16, 12), (16, 12)]
    assert [f"The result of {name}.png was not saved: " in processed.comments for name in "ab"] == [True, True]
    assert (tmp_path / "file").read_text() == "mine"


def test_transparency_stays(app: Application, tab: ExtrasTab, tmp_path: Path) -> None:
    image = gradient(16, 12).convert("RGBA")
    image.putalpha(90)
    image.save(tmp_path / "t.png")
    (result,) = run(app, tab, image=str(tmp_path / "t.png"), upscaler_1_name="Lanczos").images
    assert (result.mode, result.getpixel((9, 9))[3]) == ("RGBA", 90)


class Captions(ScriptPostprocessing):
    name = "Captions"

    def process(self, pp: PostprocessedImage, **args: Any) -> None:
        pp.caption = "a cat"
        pp.extra_images = [] if pp.nametags else [pp.create_copy(pp.image, nametags=["copy"])]


def test_captions_and_further_pictures_are_saved_too(app: Application, tmp_path: Path) -> None:
    request = ExtrasRequest(paths=[Path(put_picture(tmp_path / "a.png"))], operations=[Operation(script=Captions(), values={})], keeps_names=True)
    processed = ExtrasJob(app, request).run()
    assert len(processed.images) == 2
    assert [path.name for path in saved(app)] == ["a-copy.png", "a.png"]
    assert (saved(app)[1].with_suffix(".txt")).read_text(encoding="utf8").strip() == "a cat"


@pytest.mark.parametrize(("action", "expected"), [("Ignore", "new"), ("Keep", "old"), ("Prepend", "new old"), ("Append", "old new"), ("?", "new")])
def test_a_caption_that_is_there(action: str, expected: str) -> None:
    assert joined_caption("old", "new", action) == expected
    assert joined_caption("", "new", action) == "new"


@pytest.mark.parametrize(
    ("action", "there", "kept", "beside"),
    [
        ("Ignore", b"my dog\n", b"my dog\n", b"a cat"),
        ("Keep", b"my dog\n", b"my dog\n", None),
        ("Keep", b"\xff\xfe", b"\xff\xfe", None),
        ("Prepend", b"my dog\n", b"a cat my dog", None),
        ("Append", b"my dog\n", b"my dog a cat", None),
        ("Append", b"\xff\xfe", b"\xff\xfe", b"a cat"),
        ("Ignore", b"", b"", b"a cat"),
    ],
)
def test_a_caption_of_the_users_keeps_its_words(
    app: Application, tmp_path: Path, action: str, there: bytes, kept: bytes, beside: bytes | None
) -> None:
    app.options.postprocessing_existing_caption_action = action
    folder = tmp_path / "training"
    folder.mkdir()
    (folder / "a.txt").write_bytes(there)
    (folder / "a-copy.txt").mkdir()
    picture, operations = Path(put_picture(tmp_path / "a.png")), [Operation(script=Captions(), values={})]
    processed = ExtrasJob(app, ExtrasRequest(paths=[picture], operations=operations, keeps_names=True, output_dir=folder)).run()
    assert (folder / "a.txt").read_bytes() == kept
    assert ((folder / "a-1.txt").read_bytes() if (folder / "a-1.txt").exists() else None) == beside
    assert ("a.txt already exists" in processed.comments) is (beside is not None)


def test_a_caption_of_this_program_gives_way_to_the_next(app: Application, tmp_path: Path) -> None:
    app.options.save_images_replace_action = "Replace"
    operation = Operation(script=Captions(), values={})
    request = ExtrasRequest(paths=[Path(put_picture(tmp_path / "a.png"))], operations=[operation], keeps_names=True)
    first, second = ExtrasJob(app, request).run(), ExtrasJob(app, request).run()
    assert (first.comments, second.comments) == ("", "")
    texts = [path.name for path in saved(app)[0].parent.glob("*.txt")]
    assert texts == ["a.txt"]


def test_interrupting_keeps_what_is_done(app: Application, tmp_path: Path) -> None:
    class Stops(ScriptPostprocessing):
        name = "Stops"

        def process(self, pp: PostprocessedImage, **args: Any) -> None:
            app.state.interrupt()

    paths = [Path(put_picture(tmp_path / name)) for name in ("a.png", "b.png")]
    request = ExtrasRequest(paths=paths, operations=[Operation(script=Stops(), values={})])
    job = ExtrasJob(app, request)
    assert len(app.jobs.submit("task(i)", "extras", job.run).wait(60).images) == 1


def test_a_result_that_cannot_be_saved_is_shown_with_a_comment(app: Application, tab: ExtrasTab, tmp_path: Path) -> None:
    Path(app.options.outdir_extras_samples).parent.mkdir(parents=True, exist_ok=True)
    Path(app.options.outdir_extras_samples).write_text("a file where the folder would be")
    processed = run(app, tab, image=put_picture(tmp_path / "a.png"))
    assert len(processed.images) == 1
    assert "was not saved: " in processed.comments
