"""Runs Ray's own command that starts a head or joins a machine, so that users need one command of ours and no knowledge of Ray."""

from __future__ import annotations

import logging
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from modules.app_config import SCRIPT_DIR
from modules.launch.errors import SetupError

log = logging.getLogger(__name__)

HEAD_PORT = 6379
FLAGS_VARIABLE = "WEBUI_WORKER_FLAGS"
"""Holds the flags of launch.py that a worker's engine runs with; Ray passes the environment of `ray start` on to it."""
CONNECT_TIMEOUT_S = 5.0
_RAY = (sys.executable, "-m", "ray.scripts.scripts")


def complete_address(address: str) -> str:
    """`"gpu-1"` -> `"gpu-1:6379"`. Raises SetupError."""
    host, colon, port = address.rpartition(":")
    if not colon:
        host, port = address, str(HEAD_PORT)
    is_port = port.isdigit() and 0 < int(port) < 65536
    if not is_port or not host or any(char in host for char in " /\\@"):
        raise SetupError(f"--address {address}: not the address of a head. Give HOST or HOST:PORT, such as gpu-1:{HEAD_PORT}.")
    return f"{host}:{port}"


def check_reachable(address: str) -> None:
    """Raises SetupError unless something listens at HOST:PORT; "auto" is left to Ray."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
            pass
    except (OSError, ValueError, OverflowError) as error:
        remedy = "Check the name, that the head runs (`python -m modules.cluster head` there), and that no firewall blocks the port."
        raise SetupError(f"{address}: the head of the cluster cannot be reached ({error}). {remedy}") from error


def worker_command(address: str, num_gpus: int | None) -> list[str]:
    """`ray start` for a machine that joins."""
    gpus = [] if num_gpus is None else [f"--num-gpus={num_gpus}"]
    return [*_RAY, "start", f"--address={address}", *gpus, "--block", "--disable-usage-stats"]


def head_command(port: int, *, computes: bool) -> list[str]:
    """`ray start` for the head; with `computes` it holds a worker too. The dashboard can run code, so only this machine may see it."""
    own = [] if computes else ["--num-cpus=0", "--num-gpus=0"]
    return [*_RAY, "start", "--head", f"--port={port}", *own, "--dashboard-host=127.0.0.1", "--block", "--disable-usage-stats"]


def worker_environment(environ: Mapping[str, str], flags: Sequence[str]) -> dict[str, str]:
    """The environment of `ray start`: where this program is, and with which flags its engine runs."""
    paths = [str(SCRIPT_DIR), *filter(None, [environ.get("PYTHONPATH")])]
    separator = ";" if sys.platform == "win32" else ":"
    return {**environ, "PYTHONPATH": separator.join(paths), FLAGS_VARIABLE: shlex.join(flags)}


def run(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `ray start` until it ends; returns its exit code."""
    log.info("%s", shlex.join(["ray", *command[len(_RAY) :]]))
    return subprocess.run(command, env=dict(environ), check=False).returncode
