"""The whole program as a separate process for campaigns: started the way a user does, on a free port, with its own data folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.campaign.security_server import free_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300.0
REQUEST: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "seed": 1, "sampler_name": "Euler"}


@dataclass(frozen=True, kw_only=True)
class FullServer:
    """A running program. `post` and `get` raise urllib's errors."""

    address: str
    process: subprocess.Popen[bytes]

    def get(self, path: str, timeout_s: float = 60) -> Any:
        return self._ask(urllib.request.Request(f"{self.address}{path}"), timeout_s)

    def post(self, path: str, body: Any, timeout_s: float = 600) -> Any:
        data = json.dumps(body).encode()
        return self._ask(urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"}), timeout_s)

    def txt2img(self, **changes: Any) -> Any:
        return self.post("/sdapi/v1/txt2img", {**REQUEST, **changes})

    def kill(self) -> None:
        """SIGKILL: the process ends without closing anything."""
        self.process.kill()
        self.process.wait()

    def end(self, timeout_s: float = 60) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    @staticmethod
    def _ask(request: urllib.request.Request, timeout_s: float) -> Any:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.loads(answer.read() or b"null")


def start_server(data_dir: Path, log_file: Path, flags: Sequence[str] = ()) -> FullServer:
    """Start `launch.py --nowebui` on `data_dir` and wait until it answers. With an empty folder it uses the demo checkpoint. Raises RuntimeError."""
    port = free_port()
    command = [sys.executable, str(ROOT / "launch.py"), "--skip-prepare-environment", "--nowebui", "--port", str(port)]
    with log_file.open("ab") as log:
        process = subprocess.Popen([*command, "--data-dir", str(data_dir), *flags], cwd=ROOT, stdout=log, stderr=log, env={**os.environ})
    server = FullServer(address=f"http://127.0.0.1:{port}", process=process)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            server.get("/internal/ping", timeout_s=5)
            return server
        threading.Event().wait(0.1)
    process.kill()
    process.wait()
    raise RuntimeError(f"the server did not start:\n{log_file.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def full_server(data_dir: Path, log_file: Path, flags: Sequence[str] = ()) -> Iterator[FullServer]:
    """A server that is stopped afterwards."""
    server = start_server(data_dir, log_file, flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end()


def report(name: str, title: str, command: str, rows: Sequence[str]) -> Path:
    """Write `benchmarks/campaign_NAME.md`: the command, the versions and the results."""
    import torch

    path = ROOT / "benchmarks" / f"campaign_{name}.md"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    lines = [f"# {title}", "", f"`{command}`, {time.strftime('%Y-%m-%d')}; {versions}.", "", *rows, ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
