"""Files that this program did not save are never overwritten."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from modules.application import Application
from modules.errors import RequestError
from modules.pictures import images
from tests.support.applications import installed_application

INFO = "a fox\nSteps: 4, Sampler: Euler, Seed: 5"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def save(app: Application, folder: Path, *, info: str | None = INFO, **overrides: Any) -> tuple[Path, Path | None]:
    settings = {"save_images_add_number": False, "save_to_dirs": False, "save_txt": True, "samples_filename_pattern": "fox", **overrides}
    p = SimpleNamespace(options=app.options.snapshot(settings))
    picture, text = images.save_image(Image.new("RGB", (8, 8)), folder, "", 5, "a fox", "png", info=info, p=p)
    return Path(picture), None if text is None else Path(text)


def test_files_of_others_keep_their_place(app: Application, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "fox.png")
    (folder / "fox.txt").write_text("a caption by hand")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    picture, text = save(app, folder)
    assert (picture.name, text and text.name) == ("fox-1.png", "fox-1.txt")
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_own_files_are_replaced_where_the_settings_say_so(app: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(app, tmp_path / "out")
    assert save(app, tmp_path / "out", info=INFO + "6") == first
    monkeypatch.setattr("modules.pictures.own_files._written", OrderedDict())  # as after a restart: only the files' contents count
    assert save(app, tmp_path / "out") == first
    assert first[1] is not None and first[1].read_text() == INFO + "\n"


def test_a_picture_without_texts_is_known_in_its_own_run_only(app: Application, tmp_path: Path) -> None:
    first, _ = save(app, tmp_path / "out", info=None)
    assert save(app, tmp_path / "out", info=None)[0] == first
    Image.new("RGB", (4, 4), "red").save(first)  # someone replaced it
    assert save(app, tmp_path / "out", info=None)[0].name == "fox-1.png"


def test_a_text_written_by_hand_beside_an_own_picture_is_kept(app: Application, tmp_path: Path) -> None:
    _, text = save(app, tmp_path / "out")
    assert text is not None
    text.write_text("my notes on this picture")
    assert save(app, tmp_path / "out")[1] == text.with_name("fox-1.txt")
    assert text.read_text() == "my notes on this picture"


@pytest.mark.parametrize("pattern", ["../x", "..\\x", "a/../../x", "/etc/x", "C:\\x", "\\\\host\\x", ". ./x", "....//x", "~/x"])
@pytest.mark.parametrize("key", ["samples_filename_pattern", "directories_filename_pattern"])
def test_patterns_stay_in_the_folder(app: Application, tmp_path: Path, key: str, pattern: str) -> None:
    folder = tmp_path / "out"
    picture, text = save(app, folder, **{"save_to_dirs": True, key: pattern})
    assert text is not None
    assert picture.resolve().is_relative_to(folder.resolve()) and text.resolve().is_relative_to(folder.resolve())
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == ["out"]


def test_a_pattern_does_not_lead_from_a_folder_above_into_the_program(app: Application) -> None:
    data = app.config.data_dir
    with pytest.raises(RequestError, match="belongs to the program"):
        save(app, data.parent, save_to_dirs=True, directories_filename_pattern=f"{data.name}/models/Lora")
    with pytest.raises(RequestError, match="belongs to the program"):
        save(app, data.parent, samples_filename_pattern=f"{data.name}/extensions/x/y")
    assert not (data / "models" / "Lora").exists() and not (data / "extensions").exists()
