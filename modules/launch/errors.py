"""Errors before the program runs, explained so that a user knows what to do. Uses only the standard library."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path


class SetupError(RuntimeError):
    """Setup cannot continue; the message is for the user."""


# What pip prints when it cannot reach an index, on Linux, macOS and Windows.
_NO_NETWORK = re.compile(
    "NewConnectionError|NameResolutionError|Failed to establish a new connection|Temporary failure in name resolution|Name or service not known"
    "|getaddrinfo failed|nodename nor servname|Network is unreachable|No route to host|ConnectTimeoutError|ReadTimeoutError|ProxyError"
    "|Connection refused|ConnectionResetError|Max retries exceeded",
    re.IGNORECASE,
)
_NO_SPACE = re.compile(r"No space left on device|\[Errno 28\]|\[WinError 112\]|not enough space on the disk|Disk quota exceeded", re.IGNORECASE)
_VENV_BYTES = 50 * 2**20  # size of an empty environment, plus room to unpack pip
_NO_MATCH = re.compile(r"No matching distribution found for (?P<package>\S+)")
_OTHER_PYTHON = re.compile(r"Package '(?P<package>[^']+)' requires a different Python")
_CONFLICT = re.compile(r"ResolutionImpossible|conflicting dependencies")
_NO_BUILD = re.compile(
    r"Failed (?:building wheel for|to build(?: installable wheels for some pyproject.toml based projects)?) \(?(?P<package>[\w.-]+)"
)


def explain_pip_failure(log_text: str, asked: str, log_path: Path) -> str:
    """One plain sentence saying why pip failed and what to do, based on its log. `asked` names what was being installed.

    Checks for a missing connection before a missing package: without a network, every package is missing.
    """
    begin = f"Installing {asked} failed: "
    if _NO_SPACE.search(log_text):
        return (
            begin + f"the disk is full. Free some space, or set VENV_DIR (and TMPDIR, where pip unpacks files) to another disk. Details: {log_path}"
        )
    if _NO_NETWORK.search(log_text) and "Successfully" not in log_text:
        return begin + (
            "the package index cannot be reached. Check the network connection; set HTTPS_PROXY behind a proxy, INDEX_URL for a mirror. "
            f"If all packages are installed, --skip-install starts without a network. Details: {log_path}"
        )
    if match := _NO_MATCH.search(log_text) or _OTHER_PYTHON.search(log_text):
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]} on this system"
        return (
            begin
            + f"the index has no {match['package']} for {python}. Check the requirements file and INDEX_URL, or use Python 3.11. Details: {log_path}"
        )
    if match := _NO_BUILD.search(log_text):
        return begin + f"{match['package']} has no ready-made wheel for this Python and system, and building it failed. Details: {log_path}"
    if _CONFLICT.search(log_text):
        return begin + f"the packages require incompatible versions. Details: {log_path}"
    return begin + f"pip gave up. Last error: {_last_error_line(log_text)} Details: {log_path}"


def _last_error_line(log_text: str) -> str:
    lines = [line.strip() for line in log_text.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line]
    return (errors or lines or ["(none)"])[-1][:300]


def explain_venv_failure(output: str, venv_dir: Path, free_bytes: int) -> str:
    """Why `python -m venv` failed. It hides the output of pip's installer, so `free_bytes`, measured right after, tells whether the disk was full."""
    begin = f"Creating the virtual environment {venv_dir} failed: "
    if _NO_SPACE.search(output) or free_bytes < _VENV_BYTES:
        return begin + "the disk is full. Free some space, or set VENV_DIR to a folder on another disk."
    if "ensurepip is not available" in output or "No module named ensurepip" in output:
        return begin + "this Python has no ensurepip. On Debian and Ubuntu: apt install python3-venv. Then run this again."
    if "Permission denied" in output or "Read-only file system" in output:
        return begin + "the folder is not writable. Set VENV_DIR to a folder you own, or change the permissions."
    return begin + (output.strip().splitlines() or ["no message"])[-1][:300]


def explain_os_error(error: OSError, doing: str) -> str:
    """Plain words for a full disk and missing permissions; the system's message for anything else."""
    if error.errno == errno.ENOSPC:
        return f"{doing}: the disk is full. Free some space and try again."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{doing}: permission denied ({error.filename}). Check the permissions of that folder."
    return f"{doing}: {error.strerror or error}."


def quote_command(command: Sequence[str]) -> str:
    """A command as the user would type it."""
    return " ".join(f'"{word}"' if " " in word else word for word in command)
