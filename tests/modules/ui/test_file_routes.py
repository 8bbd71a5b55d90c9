"""Files of extensions over HTTP: what is sent, what is not, and what goes on to gradio."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from modules.application import Application
from modules.http_edge.server import SubpathApp
from modules.ui import file_routes
from tests.support.applications import installed_application
from tests.support.event_loops import close_event_loops as close_event_loops
from tests.support.extensions import loaded_extensions, write_extension

GUEST = {"javascript/guest.js": "let a;\n", "tags/my words.csv": "cat,1\n", ".env": "KEY=secret\n", "data/.keys/key.txt": "secret\n"}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Application]:
    with installed_application(tmp_path / "data") as app:
        folder = write_extension(app, "guest", GUEST)
        write_extension(app, "off", {"a.txt": "off"})
        app.config.settings_file.write_text("{}")
        (tmp_path / "outside.txt").write_text("outside")
        (folder / "way out").symlink_to(tmp_path)
        with loaded_extensions(app):
            app.options.data["disabled_extensions"].append("off")
            from modules import scripts

            scripts.load_scripts(app)
            yield app


@pytest.fixture
def client(app: Application) -> Iterator[TestClient]:
    server = FastAPI()
    file_routes.add_routes(app, server)

    @server.get("/gradio_api/file={path:path}")
    def gradios(path: str, request: Request) -> str:
        return f"gradio {path}?{request.url.query}"

    with TestClient(server) as client:
        yield client


@pytest.mark.parametrize("begin", ["/file=", "/gradio_api/file="])
def test_files_of_an_extension_are_sent(client: TestClient, app: Application, begin: str) -> None:
    answer = client.get(f"{begin}extensions/guest/tags/my%20words.csv?17")
    assert (answer.status_code, answer.text) == (200, "cat,1\n")
    assert answer.headers["x-content-type-options"] == "nosniff"
    absolute = app.config.extensions_dir / "guest" / "javascript" / "guest.js"
    answer = client.get(f"{begin}{absolute}")
    assert (answer.status_code, answer.text) == (200, "let a;\n")
    assert "javascript" in answer.headers["content-type"]
    assert client.head(f"{begin}{absolute}").status_code in (200, 405)


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "extensions/guest/.env",
        "extensions/guest/data/.keys/key.txt",
        "extensions/guest/../../config.json",
        "extensions/guest/%2e%2e/%2e%2e/config.json",
        "extensions/guest/way%20out/outside.txt",
        "extensions/guest",
        "extensions/guest/nothing.js",
        "extensions/guest/a%00b",
        "extensions/off/a.txt",
        "models/Lora/x.png",
    ],
)
def test_everything_else_is_gradios_to_answer(client: TestClient, path: str) -> None:
    answer = client.get(f"/gradio_api/file={path}")
    assert answer.status_code == 404 or answer.json().startswith("gradio ")
    old = client.get(f"/file={path}?a=1")
    assert old.status_code == 404 or (old.json().startswith("gradio ") and old.json().endswith("?a=1"))
    assert "secret" not in old.text and "outside\n" not in old.text


def test_a_subpath_is_kept_when_gradio_is_asked(app: Application) -> None:
    server = FastAPI()
    file_routes.add_routes(app, server)
    with TestClient(SubpathApp(server, "web/ui")) as client:  # type: ignore[arg-type]
        assert client.get("/web/ui/file=extensions/guest/javascript/guest.js").text == "let a;\n"
        answer = client.get("/web/ui/file=outputs/a b.png", follow_redirects=False)
        assert answer.headers["location"] == "/web/ui/gradio_api/file=outputs/a%20b.png"
