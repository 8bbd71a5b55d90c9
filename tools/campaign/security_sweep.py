"""Attacks every handler of the page and every route of the API of a real server with foreign paths and hostile settings; writes a report.

python -m tools.campaign.security_sweep
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from gradio.utils import get_upload_folder

from modules.app_config import SCRIPT_DIR
from tools.benchmarking import describe_versions
from tools.campaign.security_pages import Finding, PageSweep
from tools.campaign.security_server import RunningServer, running_server

COMMAND = "python -m tools.campaign.security_sweep"
REPORT = SCRIPT_DIR / "benchmarks" / "campaign_security_sweep.md"
PICTURE_ROUTES = ("txt2img", "img2img")
NOT_CALLED = ("/sdapi/v1/server-", "/sdapi/v1/unload", "/sdapi/v1/reload")


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


class RouteSweep:
    """Calls every route that the server's own description lists, and the routes of settings with hostile ones."""

    def __init__(self, server: RunningServer, client: httpx.Client) -> None:
        self.server, self.client = server, client
        self.num_calls: dict[str, int] = {"routes": 0, "settings": 0}

    def run(self) -> list[Finding]:
        """What leaked, failed with a 500, or was accepted and must not be."""
        return [*self._routes(), *self._settings(), *self._settings_hold()]

    def _routes(self) -> Iterator[Finding]:
        described = self.client.get("/openapi.json").json()
        for path, methods in described["paths"].items():
            if path.startswith(NOT_CALLED) or "{" in path:
                continue
            for method, route in methods.items():
                for bait in map(str, self.server.bait.files):
                    query = {parameter["name"]: bait for parameter in route.get("parameters", ()) if parameter["in"] == "query"}
                    bodies: list[Any] = [{name: shape} for name in _fields(described, route) for shape in (bait, [bait], {"path": bait})] or [None]
                    for body in bodies:
                        yield from self._call("routes", method.upper(), path, query, body)

    def _call(self, kind: str, method: str, path: str, query: dict[str, Any], body: Any) -> Iterator[Finding]:
        response = self.client.request(method, path, params=query, json=body)
        self.num_calls[kind] += 1
        if response.status_code == 500:
            yield Finding(where=f"{method} {path}", what=f"500 for {str(body)[:120]}")
        if self.server.bait.leaks_in(response.content):
            yield Finding(where=f"{method} {path}", what=f"its answer holds the bait: {str(body or query)[:120]}")

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
    """The names of the fields of a route's body."""
    schema = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    return list(described.get("components", {}).get("schemas", {}).get(name, {}).get("properties", {}))


def attack(server: RunningServer) -> tuple[list[Finding], list[tuple[str, int]]]:
    """What went wrong, and how many calls of which kind were made."""
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
    """The report as Markdown."""
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
    """0 when nothing was found."""
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as root, running_server(Path(root), share=True) as server:
        findings, rows = attack(server)
    lines = report_lines(findings, rows, time.perf_counter() - began_s)
    REPORT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    return 1 if findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
