"""Folders under the names that extensions import; see paths_internal.py."""

from __future__ import annotations

from typing import Any

from modules import paths_internal
from modules.paths_internal import cwd, extensions_builtin_dir, modules_path, script_path

__all__ = ["Prioritize", "cwd", "extensions_builtin_dir", "modules_path", "paths", "script_path"]

paths: dict[str, str] = {}


class Prioritize:
    """Supports `with Prioritize(name):` in old extensions; does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def __getattr__(name: str) -> Any:
    """`data_path`, `models_path` and the other folders of paths_internal."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(paths_internal, name)
