"""Imports files of extensions by path."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from modules.launch.guest_calls import call_guest, end_of_path

loaded_scripts: dict[str, ModuleType] = {}
"""Path -> module, for every imported script."""


def load_module(path: str) -> ModuleType:
    """Import the file `path`, again if it was imported before. Raises what the file raises.

    The module's name is that of its file, `xyz_grid.py`, by which scripts find each other; the whole end of the path finds it too."""
    spec = importlib.util.spec_from_file_location(Path(path).name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[end_of_path(path)] = sys.modules[spec.name] = module  # dataclasses look their module up by its name
    spec.loader.exec_module(module)
    loaded_scripts[path] = module
    return module


def preload_extensions(extensions_dir: str, parser: Any, extension_list: list[str] | None = None) -> None:
    """Let every `preload.py` in the folder (of extensions in `extension_list`, if given) add its flags to `parser`."""
    folder = Path(extensions_dir)
    names = extension_list if extension_list is not None else sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        file = folder / name / "preload.py"
        if file.is_file():
            call_guest(partial(_preload, file, parser), f"{end_of_path(str(file))} could not add its flags; startup continues without them")


def _preload(file: Path, parser: Any) -> None:
    kept = list(sys.path)
    sys.path.insert(0, str(file.parent))
    try:
        module = load_module(str(file))
        if hasattr(module, "preload"):
            module.preload(parser)
    finally:
        sys.path[:] = kept
