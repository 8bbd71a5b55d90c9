"""What must be the same on the front and on a worker so that pictures are the same, and how a worker that differs is refused."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

PROTOCOL = 1
"""Goes up when messages between front and workers change."""
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "pillow", "ray")
_CODE_FOLDERS = ("backend", "modules", "modules_forge", "extensions-builtin")
_SUFFIXES = frozenset({".py"})
_WORDS = {"protocol": "protocol", "program": "version of this program", "code": "program's files", "extensions": "extensions", "python": "Python"}


def collect_versions(program_dir: Path, extensions_dir: Path, program_version: str) -> dict[str, str]:
    """Everything that must agree, by name. Builds of torch for different devices (2.13.0+cpu, +cu130) count as the same version."""
    return {
        "protocol": str(PROTOCOL),
        "program": program_version,
        "code": fingerprint([program_dir / name for name in _CODE_FOLDERS]),
        "extensions": fingerprint([extensions_dir]),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _version_of(name) for name in PACKAGES},
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def fingerprint(folders: Iterable[Path]) -> str:
    """A hash of all program files in the folders, by their place in them; line ends do not count. Empty if there are none."""
    digest, found = hashlib.sha256(), False
    for folder in folders:
        paths = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES and "__pycache__" not in path.parts)
        for path in sorted(paths, key=lambda one: one.relative_to(folder).as_posix()):
            found = True
            content = path.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:16] if found else ""


def find_differences(front: Mapping[str, str], worker: Mapping[str, object]) -> list[str]:
    """What differs, in words, most telling first; empty if the worker may join."""
    return [
        f"{_WORDS.get(name, name)} {_shown(worker.get(name))} instead of {_shown(value)}"
        for name, value in front.items()
        if worker.get(name) != value
    ]


def refusal(worker: str, differences: Iterable[str]) -> str:
    """Why a worker gets no jobs, for the log and the panel."""
    return f"Worker {worker} is refused: {'; '.join(differences)}. Update that machine to the front's version and start its worker again."


def _shown(value: object) -> str:
    return str(value)[:40] or "none"
