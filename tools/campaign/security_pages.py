"""Calls every handler of the page, listed or not, over HTTP with files in its payload that the page never got."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tools.campaign.security_server import RunningServer

FILE_KINDS = frozenset({"gallery", "image", "imageeditor", "file", "video", "audio", "uploadbutton", "model3d", "json", "state", "annotatedimage"})
STUBS: dict[str, Any] = {"number": 0, "slider": 1, "checkbox": False, "textbox": "", "checkboxgroup": [], "html": "", "radio": None, "dropdown": None}
_URL = re.compile(r"/gradio_api/file=[^\"'\\ <>]+")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What went wrong with one request."""

    where: str
    what: str


def file_shapes(path: str) -> list[Any]:
    """Ways to name a file in a payload: as a browser does, without the file marker, alone, in galleries, editors and lists."""
    plain = {"path": path}
    marked = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png", "url": f"/gradio_api/file={path}"}
    bare: dict[str, Any] = {"path": path, "url": None, "size": None, "orig_name": "x.png", "mime_type": "image/png", "is_stream": False, "meta": {}}
    editor = {"background": plain, "layers": [plain], "composite": plain, "id": None}
    return [plain, marked, bare, editor, [{"image": plain, "caption": None}], [{"image": marked, "caption": None}], [plain], [marked], [path], path]


def fitting_shape(kind: str, path: str) -> Any:
    """The form in which a control of this kind takes a file, without the file marker."""
    plain = {"path": path}
    if kind == "imageeditor":
        return {"background": plain, "layers": [], "composite": None, "id": None}
    return [{"image": plain, "caption": None}] if kind == "gallery" else plain


class PageSweep:
    """Calls the handlers of a running page. `paths` are forbidden files; `is_short`: use only the fitting form."""

    def __init__(self, server: RunningServer, client: httpx.Client, paths: Sequence[str], *, is_short: bool = False) -> None:
        self.server, self.client, self.paths, self.is_short = server, client, paths, is_short
        config = client.get("/config").json()
        self.kinds = {component["id"]: component["type"] for component in config["components"]}
        self.values = {component["id"]: component["props"].get("value") for component in config["components"]}
        self.handlers = [one for one in config["dependencies"] if one["backend_fn"]]
        self.num_calls = 0
        self.unanswered: list[str] = []

    def run(self) -> list[Finding]:
        """Try every handler with every file in every input."""
        return [finding for handler in self.handlers for values in self.payloads(handler) for finding in self.attack(handler, values)]

    def payloads(self, handler: dict[str, Any]) -> Iterator[list[Any]]:
        """For each input that takes files, each form; then all inputs at once as text."""
        kinds = [self.kinds[number] for number in handler["inputs"]]
        usual = [self._usual(number) for number in handler["inputs"]]
        for place, kind in enumerate(kinds):
            if kind in FILE_KINDS:
                for shape in (shape for path in self.paths for shape in self._shapes(kind, path)):
                    yield [*usual[:place], shape, *usual[place + 1 :]]
        for path in self.paths:
            if any(kind not in FILE_KINDS for kind in kinds):
                yield [path if kind in ("textbox", "html") else value for kind, value in zip(kinds, usual)]
                yield [path if kind in ("textbox", "html", "dropdown", "radio") else value for kind, value in zip(kinds, usual)]
                yield [[path] if kind in ("dropdown", "checkboxgroup") else value for kind, value in zip(kinds, usual)]

    def _shapes(self, kind: str, path: str) -> list[Any]:
        return [fitting_shape(kind, path)] if self.is_short else file_shapes(path)

    def _usual(self, number: int) -> Any:
        value = self.values.get(number)
        return STUBS.get(self.kinds[number]) if value is None else value

    def attack(self, handler: dict[str, Any], values: list[Any]) -> Iterator[Finding]:
        """Call the handler; neither the answer nor what its links point to may contain bait."""
        name = f"handler {handler['id']} ({handler.get('api_name') or 'unnamed'})"
        answer = self.call(handler, values)
        self.num_calls += 1
        if answer is None:
            self.unanswered.append(name)
            return
        if self.server.bait.leaks_in(answer.encode()):
            yield Finding(where=name, what=f"its answer holds the bait: {json.dumps(values)[:200]}")
        for url in sorted(set(_URL.findall(answer)))[:8]:
            with self.client.stream("GET", url) as response:
                content = response.read() if response.status_code == 200 else b""
            if content and self.server.bait.leaks_in(content):
                yield Finding(where=name, what=f"it gave a link to the bait: {url[:200]}")

    def call(self, handler: dict[str, Any], values: list[Any]) -> str | None:
        """The text of the answer, successful or not; None if there was none."""
        body = {"data": values, "fn_index": handler["id"], "session_hash": "sweep"}
        if not handler["queue"]:
            return str(self.client.post("/gradio_api/run/predict", json=body).text)
        joined = self.client.post("/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return str(joined.text)
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={body['session_hash']}") as events:
            for line in events.iter_lines():
                if '"process_completed"' in line or '"unexpected_error"' in line:
                    return str(line)
        return None
