"""Which extensions are enabled, read from folders, flags and the settings file before the application exists. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.foreign_json import read_json_file
from modules.app_config import SCRIPT_DIR
from modules_forge.config import INSTEAD

BUILTIN_DIR = SCRIPT_DIR / "extensions-builtin"


def active_folders(extensions_dir: Path, settings_file: Path, flags: Mapping[str, Any], *, builtin_dir: Path = BUILTIN_DIR) -> list[Path]:
    """The folders of all extensions that will be loaded, built-in ones first."""
    disabled, which = _read_switches(settings_file, flags)
    roots = [] if which == "all" else [builtin_dir] if which == "extra" else [builtin_dir, extensions_dir]
    folders = [path for root in roots if root.is_dir() for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith((".", "__"))]
    return [path for path in folders if path.name not in disabled and (path.parent == builtin_dir or path.name.lower() not in INSTEAD)]


def _read_switches(settings_file: Path, flags: Mapping[str, Any]) -> tuple[Sequence[str], str]:
    """(disabled names, "none" / "extra" / "all") from the flags and the settings file."""
    try:
        settings = read_json_file(settings_file)
    except (OSError, ValueError):
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    names, which = settings.get("disabled_extensions", []), settings.get("disable_all_extensions", "none")
    if flags.get("disable_all_extensions"):
        which = "all"
    elif flags.get("disable_extra_extensions") and which != "all":
        which = "extra"
    return [str(name) for name in names] if isinstance(names, list) else [], str(which)
