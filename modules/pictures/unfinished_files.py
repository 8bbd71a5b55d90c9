"""Removes leftovers of killed runs at startup: temporary files (pictures, settings, models) that were never renamed.

Only names that this program alone uses (`backend/unfinished_files.py`), and only files older than this run, because another run may be
using the same folders.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from backend.model_folders import find_files
from backend.unfinished_files import is_unfinished_name

if TYPE_CHECKING:
    from modules.application import Application

log = logging.getLogger(__name__)

_MARGIN_S = 2.0
"""Longer than it takes to write a picture."""


def clear_unfinished(folders: Iterable[Path], *, before_s: float) -> int:
    """Delete those below `folders` last written before that time; returns how many. What cannot be deleted stays."""
    found = {path for folder in folders for path in find_files(folder, [".tmp"])}
    return _delete(found, before_s)


def _delete(paths: Iterable[Path], before_s: float) -> int:
    cleared = 0
    for path in paths:
        try:
            if is_unfinished_name(path.name) and path.is_file() and not path.is_symlink() and path.stat().st_mtime < before_s:
                path.unlink()
                cleared += 1
        except OSError as error:
            log.debug("%s stays: %s", path, error)
    if cleared:
        log.info("Deleted %d unfinished files left by a killed run.", cleared)
    return cleared


def start_clearing(app: Application) -> threading.Thread:
    """Clear the folders that this run writes to, on a thread because there may be many pictures."""
    options, config = app.options, app.config
    chosen = [str(options.data[key]) for key in options.data_labels if key.startswith("outdir_") and options.data.get(key)]
    folders = [config.outputs_dir, config.data_dir / "cache", config.data_dir / "log", *(config.data_dir / folder for folder in chosen)]
    folders += [
        config.models_dir,
        *config.ckpt_dirs,
        *config.vae_dirs,
        *config.text_encoder_dirs,
        *config.lora_dirs,
    ]  # descriptions are stored next to models
    folders += [*config.controlnet_dirs, *config.embeddings_dirs]
    config_dirs = {path.parent for path in (config.settings_file, *config.styles_files)} | {Path(sys.prefix)}  # the installer's stamp is there
    arguments = (folders, config_dirs, app.started_at - _MARGIN_S)
    worker = threading.Thread(target=_clear, args=arguments, name="clear-unfinished", daemon=True)
    worker.start()
    return worker


def _clear(folders: Iterable[Path], config_dirs: Iterable[Path], before_s: float) -> None:
    clear_unfinished(folders, before_s=before_s)
    _delete([path for folder in config_dirs for path in folder.glob(".*.tmp")], before_s)  # these folders hold other things: do not recurse
