"""How long does it take from the command until the page answers, on a start that installs nothing?"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tools.measure import Bench, Metrics, Variant

ROOT_DIR = Path(__file__).resolve().parents[1]
LIMIT_S = 120.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def start_and_ask(flags: tuple[str, ...], path: str) -> Metrics:
    """Start the program like a user, poll until `path` answers, and end the process.

    Raises:
        RuntimeError: it ended or did not answer within two minutes.
    """
    port = _free_port()
    command = [sys.executable, "launch.py", "--port", str(port), *flags]
    process = subprocess.Popen(command, cwd=ROOT_DIR, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ends_s = time.perf_counter() + LIMIT_S
        while not _answers(f"http://127.0.0.1:{port}{path}"):
            if process.poll() is not None or time.perf_counter() > ends_s:
                raise RuntimeError(f"{' '.join(command)} did not answer (exit code {process.returncode}). Start it by hand to see why.")
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    return {}


def import_alone() -> Metrics:
    """The time to import only the two largest packages: the lower bound."""
    subprocess.run([sys.executable, "-c", "import torch, gradio"], cwd=ROOT_DIR, check=True)
    return {}


def make_variants() -> Mapping[str, Variant]:
    return {
        "import torch, gradio": import_alone,
        "page": partial(start_and_ask, (), "/"),
        "page and API": partial(start_and_ask, ("--api",), "/sdapi/v1/samplers"),
        "API alone": partial(start_and_ask, ("--nowebui",), "/sdapi/v1/samplers"),
    }


BENCH = Bench(
    question="How long from the command to the answer, on a start that installs nothing? The floor: importing torch and gradio in turn.",
    make_variants=make_variants,
    baseline="import torch, gradio",
    num_rounds=5,
    packages=("torch", "gradio", "diffusers", "transformers"),
)
