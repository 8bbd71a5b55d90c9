"""Implements `tools/test` and `tools/check`: the launcher's own setup with the test extras, then the tools themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from modules.launch import start
from modules.launch.errors import SetupError
from modules.launch.setup import TEST_FILE, Setup, install_packages, runtime_file

ROOT_DIR = Path(__file__).resolve().parents[1]
MAX_WORKERS = 4
SUITE_OPTIONS = ("--nightly", "--junitxml", "--durations")
"""What may be said of a run of the whole suite, each with a value."""

CHECKS = (
    ("format", ("ruff", "format", "--check", ".")),
    ("lint", ("ruff", "check", ".")),
    ("types", ("mypy",)),
    ("contract", ("pytest", "-q", "tests/contract")),
)


def enter_environment(argv: Sequence[str], script: str) -> None:
    """Continue inside the virtual environment with the packages of both requirements files installed; exits if that fails."""
    start.setup_logging("INFO")
    try:
        code = start.enter_venv(argv, os.environ, Path(script).resolve(), make=True)
        if code is None:
            install_packages(Setup(requirement_files=(runtime_file(ROOT_DIR, os.environ), ROOT_DIR / TEST_FILE), environ=os.environ))
    except SetupError as error:
        print(f"ERROR: {error}")
        sys.exit(1)
    if code is not None:
        sys.exit(code)


def pytest_arguments(argv: Sequence[str], num_cores: int | None = None) -> list[str]:
    """The user's own arguments; without any but options of the whole suite, all of it on all cores, each file's tests in one process.

    One process more than cores, because tests wait for servers and the browser a sixth of the time.
    """
    num_cores = num_cores or os.cpu_count() or 1
    if num_cores == 1 or not _is_whole_suite(argv):
        return list(argv)
    num_workers = min(num_cores + 1, MAX_WORKERS)
    return ["-n", str(num_workers), "--dist", "loadfile", "--no-loadscope-reorder", *argv]


def _is_whole_suite(argv: Sequence[str]) -> bool:
    words = list(argv)
    while words:
        option, _, value = words.pop(0).partition("=")
        if option not in SUITE_OPTIONS:
            return False
        if not value and words:
            words.pop(0)
    return True


def run_tests(argv: Sequence[str], script: str) -> int:
    """Run the suite; returns pytest's exit code."""
    enter_environment(argv, script)
    return _run_module("pytest", *pytest_arguments(argv))


def run_checks(argv: Sequence[str], script: str) -> int:
    """Run format, lint, types and contract tests, or only those named; returns 1 if one of them fails."""
    names = [name for name, _ in CHECKS]
    unknown = [word for word in argv if word not in names]
    if unknown:
        print(f"ERROR: there is no check {unknown[0]}. There are: {', '.join(names)}.")
        return 2
    enter_environment(argv, script)
    return 1 if [name for name, command in CHECKS if (not argv or name in argv) and not _run_check(name, command)] else 0


def _run_check(name: str, command: Sequence[str]) -> bool:
    began_s = time.perf_counter()
    passed = _run_module(*command) == 0
    print(f"{name}: {'ok' if passed else 'FAILED'} ({time.perf_counter() - began_s:.1f} s)", flush=True)
    return passed


def _run_module(*words: str) -> int:
    return subprocess.call([sys.executable, "-m", *words], cwd=ROOT_DIR)
