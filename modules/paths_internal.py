"""Folders under the names that extensions import, from the installed application or, if there is none, from this program's own folder.

Creates no folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modules.app_config import SCRIPT_DIR
from modules.jobs.context import installed_context

script_path = str(SCRIPT_DIR)
modules_path = str(SCRIPT_DIR / "modules")
extensions_builtin_dir = str(SCRIPT_DIR / "extensions-builtin")
cwd = str(SCRIPT_DIR)


def _folders() -> dict[str, Path]:
    app = installed_context()
    if app is None:
        data = SCRIPT_DIR
        models, outputs, extensions = data / "models", data / "outputs", data / "extensions"
    else:
        config = app.config
        data, models, outputs, extensions = config.data_dir, config.models_dir, config.outputs_dir, config.extensions_dir
    return {
        "data_path": data,
        "models_path": models,
        "default_output_dir": outputs,
        "extensions_dir": extensions,
        "config_states_dir": data / "config_states",
    }


def __getattr__(name: str) -> Any:
    """`data_path, models_path, default_output_dir, extensions_dir, config_states_dir` as strings."""
    folders = _folders()
    if name not in folders:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return str(folders[name])
