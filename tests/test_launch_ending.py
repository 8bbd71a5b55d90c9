"""Ctrl+C and SIGTERM: the first one shuts down cleanly, the second one ends at once, whatever is still running."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on Linux and macOS")

ROOT = Path(__file__).resolve().parents[1]
NEVER_CLOSES = """
import signal, launch
ending = launch.Ending()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, ending)
try:
    print("runs", flush=True)
    while True:
        signal.pause()
except KeyboardInterrupt:
    print("closes", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals) -> None:
    command = [sys.executable, "-c", NEVER_CLOSES]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == "runs\n"
            process.send_signal(first)
            assert process.stdout.readline() == "closes\n"
            process.send_signal(second)
            assert process.wait(30) == 128 + second
            assert process.stderr.read() == "Stopped at once.\n"
        finally:
            process.kill()
