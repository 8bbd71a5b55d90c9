"""Runs pip so that the user sees its progress and torch is never replaced. Standard library only."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from modules.launch.errors import SetupError, explain_os_error, explain_pip_failure

log = logging.getLogger(__name__)

TORCH_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
CPU_INDEX_HINT = "https://download.pytorch.org/whl/cpu"
# (lowest torch, highest torch, xformers built for it), from the packages' metadata.
XFORMERS_FOR_TORCH = (((2, 10), (99, 0), "0.0.35"), ((2, 9), (2, 9), "0.0.33.post2"), ((2, 8), (2, 8), "0.0.32.post2"))

_REQUIREMENT = re.compile(r"^\s*(?P<name>[A-Za-z0-9][\w.-]*)")


def installed_version(package: str) -> str | None:
    """The installed version, local part included (`2.13.0+cpu`), or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_requirements(path: Path) -> bytes:
    """Contents of the requirements file.

    Raises:
        SetupError: the file is missing or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SetupError(f"The list of packages {path} cannot be read ({error.strerror}). Check REQS_FILE, or restore the file with git.") from error


def split_torch(text: str) -> tuple[str | None, list[str]]:
    """The line that pins torch, and the other lines."""
    torch_line, others = None, []
    for line in text.splitlines():
        match = _REQUIREMENT.match(line)
        if match and match["name"].lower() == "torch":
            torch_line = line.split("#")[0].strip()
        else:
            others.append(line)
    return torch_line, others


def has_nvidia_driver(*, platform: str = sys.platform, root: Path = Path("/")) -> bool:
    """Whether an NVIDIA driver is installed, from the files it leaves; runs nothing."""
    if platform == "win32":
        return Path("C:/Windows/System32/nvcuda.dll").exists()
    return (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists() or (root / "dev/dxg").exists()


def torch_command(torch_line: str, environ: Mapping[str, str], *, platform: str = sys.platform, nvidia: bool) -> str:
    """The command that installs torch: TORCH_COMMAND verbatim, else the pinned version, also from TORCH_INDEX_URL if that is set.

    On Windows the default index only has torch for CPU, so PyTorch's own index is added if there is an NVIDIA GPU.
    """
    if environ.get("TORCH_COMMAND"):
        return environ["TORCH_COMMAND"]
    index = environ.get("TORCH_INDEX_URL") or (TORCH_CUDA_INDEX if platform == "win32" and nvidia else None)
    return f"pip install {torch_line}" + (f" --extra-index-url {index}" if index else "")


def xformers_requirement(torch_version: str, environ: Mapping[str, str]) -> str | None:
    """The xformers that fits this torch, or the one in XFORMERS_PACKAGE; None if none is known."""
    if environ.get("XFORMERS_PACKAGE"):
        return environ["XFORMERS_PACKAGE"]
    numbers = tuple(int(part) for part in re.findall(r"\d+", torch_version)[:2])
    return next((f"xformers=={version}" for low, high, version in XFORMERS_FOR_TORCH if low <= numbers <= high), None)


def split_pip_command(command: str) -> list[str]:
    """`pip install X` -> `["install", "X"]`, also for `pip3 ...` and `python -m pip ...`.

    Raises:
        SetupError: not a pip command.
    """
    words = shlex.split(command)
    while words and re.fullmatch(r"(pip3?|python3?|-m)(\.exe)?", Path(words[0]).name):
        words = words[1:]
    if not words or words[0] not in ("install", "uninstall", "download"):
        raise SetupError(f"{command!r} is not a pip command. Example for TORCH_COMMAND: pip install torch --index-url URL")
    return words


def run_pip(arguments: Sequence[str], *, asked: str, log_path: Path, environ: Mapping[str, str], constraints: Path | None = None) -> None:
    """Run pip with its output on the user's terminal. Its log also goes to `log_path`.

    Raises:
        SetupError: pip failed; the message explains why.
    """
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--log", str(log_path)]
    if environ.get("INDEX_URL"):
        command += ["--index-url", environ["INDEX_URL"]]
    if constraints is not None:
        command += ["--constraint", str(constraints)]
    try:
        log_path.write_bytes(b"")
        result = subprocess.run(command, env=dict(environ), check=False)
    except OSError as error:
        raise SetupError(explain_os_error(error, f"Installing {asked}")) from error
    importlib.invalidate_caches()
    if result.returncode != 0:
        raise SetupError(explain_pip_failure(_read_log(log_path), asked, log_path))


def _read_log(log_path: Path) -> str:
    try:
        return log_path.read_text(encoding="utf-8", errors="replace")[-200_000:]
    except OSError:
        return ""
