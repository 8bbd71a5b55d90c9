"""Attacks every page handler and every API route of a real server with foreign paths and hostile settings; writes a report.

python -m tools.campaign.security_sweep
"""

from __future__ import annotations

import http.client
import itertools
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from gradio.utils import get_upload_folder

from modules.app_config import SCRIPT_DIR
from tools.benchmarking import describe_versions
from tools.campaign.security_pages import Finding, PageSweep
from tools.campaign.security_server import RunningServer, running_server

COMMAND = "python -m tools.campaign.security_sweep"
REPORT = SCRIPT_DIR / "benchmarks" / "campaign_security_sweep.md"
PICTURE_ROUTES = ("txt2img", "img2img")
CALLED_LAST = ("/sdapi/v1/server-", "/sdapi/v1/unload", "/sdapi/v1/reload")
"""What ends the server or takes its model away."""
WAITS_FOR_UPLOAD = "/gradio_api/upload_progress?upload_id={}"
PATHS_OF_FILES = (
    *("/file={}", "/file/{}", "/gradio_api/file={}", "/gradio_api/file/{}", "/static/{}", "/assets/{}", "/svelte/{}", "/gradio_api/assets/{}"),
    *("/gradio_api/stream/{}", WAITS_FOR_UPLOAD, "/gradio_api/proxy={}", "/proxy={}", "/custom_component/a/client/{}"),
    *("/webui-assets/{}", "/theme.css?v={}", "/monitoring/{}", "/pwa_icon/{}", "/gradio_api/deep_link?session_hash={}"),
)
"""Routes, gradio's among them, with a part of the path that a client chooses."""


def hostile_paths(bait: str) -> list[str]:
    """A file as a part of a URL's path: plain, coded once and twice, from above, by another slash."""
    coded = quote(bait, safe="")
    up = "../" * 12 + bait.lstrip("/")
    return [
        bait,
        bait.lstrip("/"),
        coded,
        quote(coded, safe=""),
        up,
        quote(up, safe=""),
        up.replace("../", "..%2f"),
        up.replace("/", "\\"),
        f"{coded}%00.png",
    ]


def nested(depth: int) -> Any:
    """A list nested `depth` levels."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


class RouteSweep:
    """Calls every route in the server's own description, and the settings routes with hostile settings."""

    def __init__(self, server: RunningServer, client: httpx.Client) -> None:
        self.server, self.client = server, client
        self.num_calls: dict[str, int] = {"routes": 0, "paths": 0, "settings": 0}

    def run(self) -> list[Finding]:
        """Everything that leaked, failed with a 500, or was wrongly accepted."""
        return [*self._routes(last=False), *self._paths(), *self._settings(), *self._settings_hold(), *self._routes(last=True)]

    def _paths(self, *, is_short: bool = False) -> Iterator[Finding]:
        """Every route with a part that the client chooses, with the bait as that part. `is_short`: one form for each route and file, in turn.

        The route that waits for an upload gets one form of each file, in the short run of one file: it takes three seconds to say that there is none.
        """
        described, baits = self.client.get("/openapi.json").json()["paths"], list(map(str, self.server.bait.files))
        shapes = [*PATHS_OF_FILES, *(re.sub(r"\{[^}]*\}", "{}", path) for path in described if "{" in path)]
        for turn, (shape, bait) in enumerate(itertools.product(dict.fromkeys(shapes), baits)):
            parts, is_slow = hostile_paths(bait), shape == WAITS_FOR_UPLOAD
            if is_slow and is_short and bait != baits[0]:
                continue
            for part in [parts[turn % len(parts)]] if is_short or is_slow else parts:
                yield from self._call_raw(shape.replace("{}", part))

    def _call_raw(self, path: str) -> Iterator[Finding]:
        """GET of a path as it is: httpx would tidy it up."""
        connection = http.client.HTTPConnection(urlsplit(self.server.address).netloc, timeout=120)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            yield from self._judge("paths", f"GET {path}", path, response.status, response.read())
        except http.client.HTTPException as error:
            yield Finding(where=f"GET {path}", what=f"no answer: {error!r}")
        finally:
            connection.close()

    def _routes(self, *, last: bool) -> Iterator[Finding]:
        """Every route that is described; `last`: those that end something. The server's end is only noted."""
        described = self.client.get("/openapi.json").json()
        for path, methods in described["paths"].items():
            if path.startswith(CALLED_LAST) is not last or "{" in path:
                continue
            for method, route in methods.items():
                for bait in map(str, self.server.bait.files):
                    query = {parameter["name"]: bait for parameter in route.get("parameters", ()) if parameter["in"] == "query"}
                    bodies: list[Any] = [{name: shape} for name in _fields(described, route) for shape in (bait, [bait], {"path": bait})] or [None]
                    for body in bodies:
                        yield from self._call("routes", method.upper(), path, query, body)

    def _call(self, kind: str, method: str, path: str, query: dict[str, Any], body: Any) -> Iterator[Finding]:
        response = self.client.request(method, path, params=query, json=body)
        yield from self._judge(kind, f"{method} {path}", body or query, response.status_code, response.content)

    def _judge(self, kind: str, where: str, asked: Any, status: int, content: bytes) -> Iterator[Finding]:
        self.num_calls[kind] += 1
        if status == 500:
            yield Finding(where=where, what=f"500 for {str(asked)[:120]}")
        if self.server.bait.leaks_in(content):
            yield Finding(where=where, what=f"its answer holds the bait: {str(asked)[:120]}")

    def _settings(self) -> Iterator[Finding]:
        bait = self.server.bait
        values = [str(bait.folder), str(SCRIPT_DIR), str(bait.data_dir), "models", "../x", nested(20), {"a": nested(20)}, "x\0", 10**30, ["a", ["b"]]]
        for key in self.client.get("/sdapi/v1/options").json():
            for value in values:
                yield from self._call("settings", "POST", "/sdapi/v1/options", {}, {key: value})
        for key in ("outdir_samples", "outdir_txt2img_samples", "profiling_filename", "api_forbid_local_requests", "font"):
            for value in (*values, False):
                overrides = {key: value, "samples_filename_pattern": "requirements", "save_images_add_number": False, "save_txt": True}
                body = {
                    "prompt": "evil==1 #",
                    "steps": 1,
                    "save_images": True,
                    "override_settings": overrides,
                    "override_settings_restore_afterwards": False,
                }
                for name in PICTURE_ROUTES:
                    yield from self._call("settings", "POST", f"/sdapi/v1/{name}", {}, body)

    def _settings_hold(self) -> Iterator[Finding]:
        options = self.server.app.options
        for key, info in options.data_labels.items():
            if info.restrict_api and options.data[key] != info.default:
                yield Finding(where=f"setting {key}", what="a request changed it")
        if self.client.get("/sdapi/v1/options").status_code != 200:
            yield Finding(where="GET /sdapi/v1/options", what="no longer answers")


def _fields(described: dict[str, Any], route: dict[str, Any]) -> list[str]:
    """Names of the fields of a route's body."""
    schema = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    return list(described.get("components", {}).get("schemas", {}).get(name, {}).get("properties", {}))


def attack(server: RunningServer) -> tuple[list[Finding], list[tuple[str, int]]]:
    """Findings, and the number of calls per kind."""
    bait = server.bait
    with httpx.Client(base_url=server.address, timeout=120) as client:
        pages, routes = PageSweep(server, client, [str(path) for path in bait.files], is_short=True), RouteSweep(server, client)
        findings = [*pages.run(), *routes.run()]
    findings += [Finding(where=name, what="no answer") for name in pages.unanswered]
    findings += [Finding(where=path, what="a copy of the bait") for path in bait.copies([server.app.config.data_dir, Path(get_upload_folder())])]
    findings += [Finding(where=path, what="made, changed or removed") for path in bait.changed_files()]
    rows = [(f"handlers of the page ({len(pages.handlers)})", pages.num_calls), *((kind, count) for kind, count in routes.num_calls.items())]
    return findings, rows


def report_lines(findings: list[Finding], rows: list[tuple[str, int]], seconds: float) -> list[str]:
    """The report as Markdown lines."""
    table = ["| attacked | calls |", "|---|---|", *(f"| {kind} | {count} |" for kind, count in rows)]
    found = [f"- {finding.where}: {finding.what}" for finding in findings] or ["Nothing came out, was copied, replaced or broken."]
    return [
        *(
            "# Security sweep",
            "",
            "Does any handler of the page or route of the API give away, copy or replace a file that its client may not have?",
            "",
        ),
        *(f"- command: `{COMMAND}`", f"- date: {time.strftime('%Y-%m-%d')}", f"- versions: {describe_versions(['gradio', 'fastapi', 'pillow'])}"),
        *(f"- {seconds:.0f} s; server with `--api`, as with `--share`, no password, no model", "", *table, "", "## Findings", "", *found, ""),
    ]


def main() -> int:
    """Returns 0 if nothing was found."""
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as root, running_server(Path(root), share=True, disable_extension_access=True, api_server_stop=True) as server:
        findings, rows = attack(server)
    lines = report_lines(findings, rows, time.perf_counter() - began_s)
    REPORT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
