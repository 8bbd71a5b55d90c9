"""Servers forked from a process that has imported everything and runs no thread: each is the whole program, up in a fraction of the time.

Linux and macOS only. The forked process runs `launch.main`, with its own argv, log file and signals, and ends as any other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from modules.launch.cmd_args import parse_config
from modules.launch.env import library_environment

IMPORTED = (
    *("launch", "webui", "gradio", "modules.http_edge.server", "modules.api.api", "modules.scripts.without_page", "modules.ui.tabs"),
    *("backend.loader", "modules.processing.pictures", "modules.samplers.kdiffusion"),
)
"""What a start and its first picture import."""


class ForkedProcess:
    """A forked server, with the methods of `subprocess.Popen` that campaigns use."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_process(arguments: Sequence[str], log_file: Path) -> ForkedProcess:
    """Run `launch.py ARGUMENTS` in a forked process that writes to `log_file`."""
    process = _importing_process().Process(target=_run, args=(list(arguments), log_file), daemon=True)
    process.start()
    return ForkedProcess(process)


@cache
def _importing_process() -> Any:
    """Start the process that servers are forked from. Variables that libraries read at import are set as launch.py sets them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with mock.patch.dict(os.environ, library_environment(parse_config([], {}), os.environ)):
        forkserver.ensure_running()
    return context


def _run(arguments: list[str], log_file: Path) -> None:
    import launch  # imported before the fork

    with log_file.open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.argv = ["launch.py", *arguments]
    launch.leave(launch.main())
