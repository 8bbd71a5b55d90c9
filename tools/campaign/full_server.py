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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tools.campaign.security_server import free_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 300.0
REQUEST: dict[str, Any] = {"prompt": "a red circle", "steps": 2, "seed": 1, "sampler_name": "Euler"}


class ServerProcess(Protocol):
    """The process of a server: a `subprocess.Popen`, or one like it."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FullServer:
    """A running program. `post` and `get` raise urllib's errors."""

    address: str
    process: ServerProcess

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


def start_process(arguments: Sequence[str], log_file: Path) -> ServerProcess:
    """Run `launch.py ARGUMENTS`, as a user does, in a process that writes to `log_file`."""
    with log_file.open("ab") as log:
        return subprocess.Popen([sys.executable, str(ROOT / "launch.py"), *arguments], cwd=ROOT, stdout=log, stderr=log, env={**os.environ})


Start = Callable[[Sequence[str], Path], ServerProcess]


def start_server(data_dir: Path, log_file: Path, flags: Sequence[str] = ("--nowebui",), *, start: Start = start_process) -> FullServer:
    """Start the program on `data_dir` and wait until it answers. With an empty folder it uses the demo checkpoint. Raises RuntimeError."""
    port = free_port()
    process = start(["--skip-prepare-environment", "--port", str(port), "--data-dir", str(data_dir), *flags], log_file)
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
def full_server(data_dir: Path, log_file: Path, flags: Sequence[str] = ("--nowebui",), *, start: Start = start_process) -> Iterator[FullServer]:
    """A server that is stopped afterwards."""
    server = start_server(data_dir, log_file, flags, start=start)
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
