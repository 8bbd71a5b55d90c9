from __future__ import annotations

from pathlib import Path

from PIL import Image, PngImagePlugin

from modules.ui import pnginfo

INFOTEXT = "a <red> circle\nSteps: 4, Sampler: Euler, Seed: 1, Size: 8x8"


def write_picture(path: Path, **texts: str) -> str:
    data = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        data.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=data)
    return str(path)


def test_parameters_are_shown_as_they_were_written(tmp_path: Path) -> None:
    parameters, _ = pnginfo.read_picture(write_picture(tmp_path / "a.png", parameters=INFOTEXT))
    assert parameters == INFOTEXT


def test_other_texts_are_shown_escaped(tmp_path: Path) -> None:
    parameters, details = pnginfo.read_picture(write_picture(tmp_path / "a.png", parameters=INFOTEXT, Author="<b>me</b>"))
    assert parameters == INFOTEXT
    assert "&lt;b&gt;me&lt;/b&gt;" in details


def test_picture_without_text_says_so(tmp_path: Path) -> None:
    parameters, details = pnginfo.read_picture(write_picture(tmp_path / "a.png"))
    assert parameters == ""
    assert "contains no text" in details


def test_file_that_is_no_picture_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    parameters, details = pnginfo.read_picture(str(tmp_path / "a.png"))
    assert parameters == ""
    assert "cannot be read as a picture" in details


def test_nothing_is_shown_when_the_picture_is_taken_away() -> None:
    assert pnginfo.read_picture(None) == ("", "")
