"""The program's virtual environment: where its Python is, how it is created, and how to continue inside it.

Standard library only. Reads neither argv nor the environment; both are passed in.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from modules.app_config import SCRIPT_DIR
from modules.launch.errors import SetupError, explain_os_error, explain_venv_failure

log = logging.getLogger(__name__)

INSIDE_MARK = "WEBUI_INSIDE_VENV"


def is_inside(environ: Mapping[str, str], prefix: str = sys.prefix, base_prefix: str = sys.base_prefix) -> bool:
    """True in a venv, a virtualenv, or a conda environment other than base."""
    if prefix != base_prefix:
        return True
    conda = environ.get("CONDA_PREFIX")
    return bool(conda) and Path(str(conda)) == Path(prefix) and environ.get("CONDA_DEFAULT_ENV") != "base"


def python_path(venv_dir: Path, *, windows: bool = os.name == "nt") -> Path:
    """The environment's Python."""
    return venv_dir / "Scripts" / "python.exe" if windows else venv_dir / "bin" / "python"


def choose_dir(root_dir: Path, environ: Mapping[str, str]) -> Path | None:
    """`venv` in the program's folder, or VENV_DIR; `VENV_DIR=-` means none: packages are installed into the current Python."""
    name = environ.get("VENV_DIR") or "venv"
    return None if name == "-" else root_dir / Path(name).expanduser()


def make_venv(venv_dir: Path, python: str = sys.executable) -> None:
    """Create the environment, unless a working one exists.

    Raises:
        SetupError: it cannot be created, or the existing one does not run.
    """
    if python_path(venv_dir).exists():
        _check_runs(venv_dir)
        return
    log.info("Creating a virtual environment in %s", venv_dir)
    made_here = not venv_dir.exists()
    result = subprocess.run([python, "-m", "venv", str(venv_dir)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        free_bytes = shutil.disk_usage(venv_dir if venv_dir.exists() else SCRIPT_DIR).free
        if made_here:
            shutil.rmtree(venv_dir, ignore_errors=True)
        raise SetupError(explain_venv_failure(result.stdout + result.stderr, venv_dir, free_bytes))


def _check_runs(venv_dir: Path) -> None:
    """An environment breaks when the Python that created it is removed: its link then points nowhere."""
    python = python_path(venv_dir)
    try:
        works = subprocess.run([str(python), "-c", "import pip"], capture_output=True, check=False).returncode == 0
    except OSError:
        works = False
    if not works:
        raise SetupError(
            f"The virtual environment {venv_dir} exists, but its Python does not work (was it moved, or its creation interrupted?). "
            "Delete that folder and run this again."
        )


def run_inside(venv_dir: Path, script: Path, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Continue with the same script and arguments in the environment's Python. On Linux and macOS this call does not return.

    Raises:
        SetupError: the environment's Python is not in an environment, or cannot be run.
    """
    if environ.get(INSIDE_MARK):
        raise SetupError(f"{python_path(venv_dir)} does not run inside {venv_dir}. Delete that folder and run this again.")
    command = [str(python_path(venv_dir)), str(script), *argv]
    inside = {**environ, INSIDE_MARK: "1"}
    try:
        if _can_replace_process():
            sys.stdout.flush()
            sys.stderr.flush()
            os.execve(command[0], command, inside)
        return subprocess.call(command, env=inside)
    except OSError as error:
        raise SetupError(explain_os_error(error, f"Starting {command[0]}")) from error


def _can_replace_process() -> bool:
    """False on Windows, which has no exec that keeps the terminal."""
    return os.name != "nt"
