"""A real server in a temporary folder surrounded by bait for campaigns: files that no client may read, copy, replace or get a link to."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from modules import application
from modules.application import Application
from modules.launch.cmd_args import config_for_tests

MARK = "BAIT-7d1f4c"
COLOR = (17, 201, 93)
SIDE_PX = 24
CHANGING = ("outputs", "log", "logs", "cache", "params.txt", "config.json", "styles.csv", "styles.csv.bak", "ui-config.json")
"""What a server writes below its data folder. Everything else there must be unchanged at the end."""
INDEX = "history.sqlite3"
"""Begins the names of the history's files, which it writes too."""


@dataclass(kw_only=True)
class Bait:
    """`files` are the targets of attacks. `leaks_in` tells whether bytes equal or contain one of them."""

    folder: Path
    data_dir: Path
    files: list[Path] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)

    def leaks_in(self, content: bytes) -> bool:
        return MARK.encode() in content or _has_color(content)

    def changed_files(self) -> list[str]:
        """Files outside the server's own folders that were created, changed or deleted since the start."""
        now = self._digests()
        return sorted(name for name in {*self.before, *now} if self.before.get(name) != now.get(name))

    def copies(self, folders: list[Path]) -> list[str]:
        """Files below `folders` that contain bait, other than the bait itself."""
        found = [path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        return [str(path) for path in found if path not in self.files and self.leaks_in(path.read_bytes())]

    def _digests(self) -> dict[str, str]:
        roots = [self.folder, *(path for path in self.data_dir.iterdir() if path.name not in CHANGING and not path.name.startswith(INDEX))]
        files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _has_color(content: bytes) -> bool:
    """Whether these bytes are a picture in the bait's color."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixel = image.convert("RGB").getpixel((image.width // 2, image.height // 2))
    except (OSError, SyntaxError, ValueError):
        return False
    return isinstance(pixel, tuple) and all(abs(ours - theirs) <= 6 for ours, theirs in zip(pixel, COLOR))


def lay_bait(root: Path, data_dir: Path) -> Bait:
    """Put pictures and texts next to and inside the data folder, and links and paths below the outputs folder that lead to them."""
    bait = Bait(folder=root / "private", data_dir=data_dir)
    bait.folder.mkdir(parents=True)
    data_dir.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{MARK} in a picture\nSteps: 1, Sampler: Euler, Seed: 1")
    picture, text = bait.folder / "picture.png", bait.folder / "secret.txt"
    Image.new("RGB", (SIDE_PX, SIDE_PX), COLOR).save(picture, pnginfo=info)
    text.write_text(f"{MARK} in a text\n")
    within = data_dir / "requirements.txt"
    within.write_text(f"{MARK} in the data folder\n")
    outputs = data_dir / "outputs"
    outputs.mkdir()
    links = [outputs / "link.png", outputs / "link.txt"]
    for link, target in zip(links, (picture, text)):
        link.symlink_to(target)
    (outputs / "notes.txt").write_text(f"{MARK} beside pictures\n")
    bait.files = [picture, text, within, outputs / "notes.txt", *links]
    bait.before = bait._digests()
    return bait


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """`address` is the URL; `app` and `page` are inspected to find what to attack."""

    address: str
    app: Application
    page: Any
    bait: Bait


@contextlib.contextmanager
def running_server(root: Path, **config: Any) -> Iterator[RunningServer]:
    """The page and the API over HTTP on a free local port, with bait in place; `config` are fields of AppConfig."""
    import webui
    from modules.http_edge.server import WebServer, create_fastapi_app, keep_page_last

    data_dir = root / "data"
    bait = lay_bait(root, data_dir)
    settings = config_for_tests(data_dir, **{"port": free_port(), "api": True, **config})
    app = application.build_application(settings)
    application.install(app)
    server = WebServer(settings)
    try:
        fastapi_app = create_fastapi_app(settings)
        app.fastapi_app = fastapi_app
        from modules.api.api import create_api

        create_api(app, fastapi_app)
        webui.add_page(app, fastapi_app, webui.EngineStart(settings))
        keep_page_last(fastapi_app)
        server.start(fastapi_app)
        bait.before = bait._digests()
        yield RunningServer(address=server.address, app=app, page=app.demo, bait=bait)
    finally:
        server.stop()
        application.install(None)
        app.close()


def free_port() -> int:
    """A free port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
