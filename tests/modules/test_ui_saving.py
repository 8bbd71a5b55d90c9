from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from modules import ui_saving
from modules.application import Application
from modules.ui_saving import PictureSaver
from tests.support.applications import installed_application

INFO = json.dumps({"prompt": "a, cat", "seed": 5, "sampler_name": "Euler", "cfg_scale": 7.0, "steps": 4, "width": 8, "height": 8})


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


@pytest.fixture
def gallery(tmp_path: Path) -> list[tuple[str, None]]:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return [(str(tmp_path / "a.png"), None), (str(tmp_path / "b.png"), None)]


def test_selected_picture_is_copied_as_it_is(app: Application, gallery: list[tuple[str, None]]) -> None:
    files, log = PictureSaver(app, "txt2img").save(gallery, INFO, 1)
    saved = Path(files["value"][0])
    assert [Path(file).name for file in files["value"]] == ["b.png"]
    assert saved.read_bytes() == Path(gallery[1][0]).read_bytes()
    assert saved.parent == Path(app.options.outdir_save)
    assert "b.png" in log


def test_all_are_copied_when_none_is_selected_or_the_option_says_so(app: Application, gallery: list[tuple[str, None]]) -> None:
    saver = PictureSaver(app, "txt2img")
    assert len(saver.save(gallery, INFO, -1)[0]["value"]) == 2
    app.options.set("save_selected_only", False)
    assert len(saver.save(gallery, INFO, 1)[0]["value"]) == 2


def test_saving_twice_keeps_both(app: Application, gallery: list[tuple[str, None]]) -> None:
    saver = PictureSaver(app, "txt2img")
    names = [Path(saver.save(gallery, INFO, 0)[0]["value"][0]).name for _ in range(3)]
    assert names == ["a.png", "a-1.png", "a-2.png"]


def test_log_has_a_line_for_each_picture(app: Application, gallery: list[tuple[str, None]]) -> None:
    saver = PictureSaver(app, "txt2img")
    saver.save(gallery, INFO, 0)
    saver.save(gallery, INFO, 1)
    with (Path(app.options.outdir_save) / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["seed"], row["sampler"], row["cfgs"], row["filename"]) for row in rows] == [
        ("a, cat", "5", "Euler", "7.0", "a.png"),
        ("a, cat", "5", "Euler", "7.0", "b.png"),
    ]


def test_zip_holds_every_picture(app: Application, gallery: list[tuple[str, None]]) -> None:
    files, _ = PictureSaver(app, "img2img").save_zip(gallery, INFO, 0)
    with zipfile.ZipFile(files["value"][0]) as archive:
        assert archive.namelist() == ["00-a.png", "01-b.png"]
        assert archive.read("01-b.png") == Path(gallery[1][0]).read_bytes()
    assert not list(Path(app.options.outdir_save).glob("*.tmp"))


@pytest.mark.parametrize("method", ["save", "save_zip"])
def test_empty_gallery_is_told_in_words(app: Application, method: str) -> None:
    files, log = getattr(PictureSaver(app, "txt2img"), method)(None, "", 0)
    assert files["visible"] is False
    assert "no picture to save" in log


def test_folder_that_is_not_there_yet_opens_nothing(app: Application, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ui_saving.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("nothing may be started"))
    PictureSaver(app, "txt2img").open_folder()
    assert "made with the first picture" in capsys.readouterr().out
