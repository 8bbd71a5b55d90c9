"""Records what was last installed, so that the next start need not run pip. Standard library only."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from backend.foreign_json import read_json_file
from backend.unfinished_files import replacing

FILE_NAME = "webui-installed.json"


def fingerprint(files: Mapping[str, bytes], torch_command: str) -> str:
    """Changes when a requirements file, the Python, or the command that installs torch changes."""
    digest = hashlib.sha256()
    for part in (f"{sys.version_info[0]}.{sys.version_info[1]}", sys.platform, torch_command):
        digest.update(part.encode() + b"\0")
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def read_stamp(path: Path) -> dict[str, str]:
    """The stamp's entries; empty if it is missing or unreadable."""
    try:
        entries = read_json_file(path)
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in entries.items()} if isinstance(entries, dict) else {}


def write_stamp(path: Path, entries: Mapping[str, str]) -> None:
    """Replace the stamp atomically."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(dict(entries), indent=2, sort_keys=True) + "\n", encoding="utf-8")
