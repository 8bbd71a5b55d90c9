from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.application import Application
from modules.prompts.styles import read_styles
from modules.ui.style_dialog import delete_style, save_style, style_texts
from tests.support.applications import installed_application


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        yield app


def test_a_style_is_written_shown_changed_and_deleted(app: Application, recwarn: pytest.WarningsRecorder) -> None:
    window, field = save_style(app, " photo ", "a photo of {prompt}", "blurry")
    assert (window["choices"], window["value"]) == ([("photo", "photo")], "photo") or window["choices"] == ["photo"]
    assert style_texts(app, "photo") == ("a photo of {prompt}", "blurry")
    save_style(app, "photo", "photo, {prompt}", "")
    assert [style.prompt for style in read_styles(app.styles.default_path)] == ["photo, {prompt}"]
    assert field["choices"] == window["choices"]
    assert delete_style(app, "photo")[2:] == ["", ""]
    assert (app.styles.names(), read_styles(app.styles.default_path)) == ([], [])


def test_nothing_is_lost_by_mistakes(app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("modules.ui.style_dialog.gr.Warning", said.append)
    save_style(app, "a", "x", "")
    save_style(app, "  ", "x", "")
    delete_style(app, "gone")
    app.styles.default_path.write_bytes(b"\xff\xfe broken \x00")
    save_style(app, "b", "y", "")
    delete_style(app, "a")
    assert len(said) == 4
    assert app.styles.names() == ["a"]
    assert app.styles.default_path.read_bytes() == b"\xff\xfe broken \x00"


def test_the_texts_stay_while_a_new_name_is_typed(app: Application) -> None:
    prompt, negative = style_texts(app, "not there yet")
    assert prompt == negative and prompt != ""
