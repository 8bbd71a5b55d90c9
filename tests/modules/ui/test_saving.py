from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from modules.application import Application
from modules.ui import page_files, saving
from modules.ui.saving import PictureSaver
from tests.support.applications import installed_application

INFO = json.dumps({"prompt": "a, cat", "seed": 5, "sampler_name": "Euler", "cfg_scale": 7.0, "steps": 4, "width": 8, "height": 8})


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


@pytest.fixture
def gallery(app: Application) -> list[tuple[str, None]]:
    folder = app.config.outputs_dir / "txt2img-images"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return [(str(folder / "a.png"), None), (str(folder / "b.png"), None)]


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


def test_rows_go_behind_a_log_of_a1111s_and_never_into_another_table(app: Application, gallery: list[tuple[str, None]]) -> None:
    folder, saver = Path(app.options.outdir_save), PictureSaver(app, "txt2img")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("date,weight\n1,70")
    (folder / "log-1.csv").write_bytes(b"\xff\xfe\x00")
    old = "prompt,seed,width,height,sampler,cfgs,steps,filename,negative_prompt\ndog,1,,,,,,d.png,"
    (folder / "log-2.csv").write_text(old)
    saver.save(gallery, INFO, 0)
    assert (folder / "log.csv").read_text() == "date,weight\n1,70"
    assert (folder / "log-1.csv").read_bytes() == b"\xff\xfe\x00"
    with (folder / "log-2.csv").open(newline="") as file:
        assert [(row["prompt"], row["filename"]) for row in csv.DictReader(file)] == [("dog", "d.png"), ("a, cat", "a.png")]


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
    monkeypatch.setattr(saving.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("nothing may be started"))
    PictureSaver(app, "txt2img").open_folder()
    assert "first picture creates it" in capsys.readouterr().out


def foreign_files(app: Application, tmp_path: Path) -> list[str]:
    """Files that no browser may get, also by paths that seem to lead below the outputs folder."""
    outputs = app.config.outputs_dir
    (outputs / "sub").mkdir(parents=True, exist_ok=True)
    picture, text = tmp_path / "private.png", tmp_path / "secret.txt"
    Image.new("RGB", (8, 8)).save(picture)
    text.write_text("secret")
    (outputs / "notes.txt").write_text("secret")
    (outputs / "link.png").symlink_to(text)
    (outputs / "linked.png").symlink_to(picture)
    (outputs / "folder.png").mkdir()
    beside = outputs.with_name("outputs-private")
    beside.mkdir()
    Image.new("RGB", (8, 8)).save(beside / "x.png")
    return [
        *("/etc/passwd", str(picture), str(text), str(outputs / "notes.txt"), str(outputs / "link.png"), str(outputs / "linked.png")),
        *(str(outputs / "folder.png"), str(beside / "x.png"), f"{outputs}/sub/../../../private.png", f"{outputs}/x.png\0.png", "none.png"),
        *("http://127.0.0.1/x.png", f"file://{picture}"),
    ]


@pytest.mark.parametrize("method", ["save", "save_zip"])
def test_only_pictures_of_the_page_are_copied(app: Application, gallery: list[tuple[str, None]], tmp_path: Path, method: str) -> None:
    app.options.set("save_selected_only", False)
    for path in foreign_files(app, tmp_path):
        for shown in ([(path, None)], [gallery[0], (path, None)], [path]):
            files, said = getattr(PictureSaver(app, "txt2img"), method)(shown, INFO, -1)
            assert (files.get("value"), files["visible"]) == (None, False), path
            assert "no picture" in said or "not a picture of this page" in said
    assert not Path(app.options.outdir_save).exists()


def test_picture_that_is_shown_but_not_saved_can_be_kept(app: Application) -> None:
    class Owner:
        pass

    owner = Owner()
    file = page_files.new_gallery_folder(owner) / "shown.png"
    Image.new("RGB", (8, 8)).save(file)
    assert Path(PictureSaver(app, "txt2img").save([(str(file), None)], INFO, 0)[0]["value"][0]).read_bytes() == file.read_bytes()
    folder = file.parent
    del owner
    assert not folder.exists()
    assert page_files.file_below(file, page_files._gallery_folders) is None


def test_galleries_of_extensions_keep_uploads_under_a_name_of_ours(app: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "get_upload_folder", lambda: str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    good, bad = tmp_path / "uploads" / "requirements.png", tmp_path / "uploads" / "not.png"
    Image.new("RGB", (8, 8)).save(good)
    bad.write_text("no picture")
    files, _ = saving.save_files(INFO, [(str(good), None)], False, -1)
    assert [Path(file).name for file in files["value"]] == ["txt2img.png"]
    assert "not a picture" in saving.save_files(INFO, [(str(bad), None)], False, -1)[1]
    with zipfile.ZipFile(saving.save_files(INFO, [(str(good), None)], True, -1)[0]["value"][0]) as archive:
        assert archive.namelist() == ["00-txt2img.png"]


def test_two_who_save_at_once_keep_both(app: Application, gallery: list[tuple[str, None]]) -> None:
    savers = [PictureSaver(app, "txt2img") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        names = {Path(files["value"][0]).name for files, _ in pool.map(lambda saver: saver.save(gallery, INFO, 0), savers)}
    assert len(names) == 8


def test_folder_that_cannot_be_written_is_told_in_words(app: Application, gallery: list[tuple[str, None]]) -> None:
    folder = Path(app.options.outdir_save)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    for method in ("save", "save_zip"):
        assert "could not be saved" in getattr(PictureSaver(app, "txt2img"), method)(gallery, INFO, 0)[1]
