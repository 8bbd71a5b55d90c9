"""Of the outputs folder only pictures have a URL."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest

from modules.http_edge.shown_files import names_no_picture
from tests.modules.http_edge.test_edge import client_for


@pytest.mark.parametrize("name", ["notes.txt", "sub/a.txt", "log.csv", "a.png.txt", "noend", "link.png", "", "a.PNG/../b.json", ".png"])
@pytest.mark.parametrize("route", ["/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/"])
def test_texts_of_the_outputs_folder_have_no_url(tmp_path: Path, route: str, name: str) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "secret.txt").write_text("x")
    (outputs / "link.png").symlink_to(outputs / "secret.txt")
    assert names_no_picture(f"{route}{outputs}/{name}", outputs)
    assert names_no_picture(f"{route}{'../' * 12}{str(outputs)[1:]}/{name}", outputs)
    assert not names_no_picture(f"{route}{outputs}/{name}", outputs, [str(tmp_path)])


@pytest.mark.parametrize(
    "path", ["/gradio_api/file=outputs/a.PNG", "/gradio_api/file=outputs/b/c.webp", "/gradio_api/file=elsewhere/a.txt", "/sdapi/v1/file"]
)
def test_pictures_and_what_is_elsewhere_are_not_its_matter(tmp_path: Path, path: str) -> None:
    assert not names_no_picture(path.replace("outputs", str(tmp_path / "outputs")), tmp_path / "outputs")


def test_the_edge_asks(tmp_path: Path) -> None:
    with client_for(tmp_path) as client:
        answers = [client.get(f"/gradio_api/file={tmp_path}/outputs/{unquote(name)}").status_code for name in ("notes.txt", "gone.txt", "gone.png")]
    assert answers == [403, 403, 404]
