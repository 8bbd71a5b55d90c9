"""Finds and imports what extensions provide: scripts ordered by their metadata, files for the page, classes of scripts.

Must not know the page, jobs, or what a script does.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

from modules.app_config import SCRIPT_DIR
from modules.launch.guest_calls import call_guest, end_of_path
from modules.launch.script_loading import load_module
from modules.scripts import installed as extensions
from modules.scripts.base import Script, ScriptBuiltinUI
from modules.scripts.extension_order import OrderRule, order_by_rules
from modules.scripts.files import ScriptClassData, ScriptFile
from modules.scripts.hooks import find_faults
from modules.scripts.postprocessing import ScriptPostprocessing

log = logging.getLogger(__name__)

_BASES = (Script, ScriptBuiltinUI, ScriptPostprocessing)


def list_scripts(scriptdirname: str, extension: str, *, include_extensions: bool = True) -> list[ScriptFile]:
    """Files with suffix `extension` in the folder `scriptdirname` here and in each active extension, in the order set by metadata.ini."""
    found = _own_files(scriptdirname, extension)
    if not include_extensions:
        return found
    rules: list[OrderRule] = []
    for owner in extensions.active():
        for file in owner.list_files(scriptdirname, extension):
            found.append(file)
            name = script_name(file)
            rules += owner.metadata.rules_for(name, f"{scriptdirname}/{file.filename}", scriptdirname)
    by_name = {script_name(file): file for file in found}
    return [by_name[name] for name in order_by_rules(list(by_name), _about_files(rules, list(by_name)))]


def script_name(file: ScriptFile) -> str:
    """extension/file.py, the form metadata.ini uses; only the name for a file in the program's own folders."""
    owner = extensions.find_extension(file.path)
    return f"{owner.canonical_name}/{file.filename}".lower() if owner is not None else file.filename.lower()


def _about_files(rules: list[OrderRule], names: list[str]) -> list[OrderRule]:
    """Rules that name an extension, expanded to each of its files."""

    def files_of(name: str) -> list[str]:
        return [name] if name in names else [file for file in names if file.startswith(f"{name}/")]

    return [OrderRule(first=first, then=then) for rule in rules for first in files_of(rule.first) for then in files_of(rule.then)]


def _own_files(folder: str, extension: str) -> list[ScriptFile]:
    path = SCRIPT_DIR / folder
    found = sorted(path.iterdir()) if path.is_dir() and folder != "javascript" else []  # the page itself adds its own scripts
    return [ScriptFile(str(SCRIPT_DIR), file.name, str(file)) for file in found if file.suffix == extension and file.is_file()]


def list_files_with_name(filename: str, *, include_own: bool = True) -> list[str]:
    """Paths of `filename` in this program's folder (with `include_own`) and in each active extension."""
    folders = [*([SCRIPT_DIR] if include_own else []), *(Path(owner.path) for owner in extensions.active())]
    return [str(folder / filename) for folder in folders if (folder / filename).is_file()]


class Basedir:
    """The extension whose script is being imported; otherwise this program's folder."""

    def __init__(self) -> None:
        self.current = str(SCRIPT_DIR)


def import_scripts(basedir: Basedir) -> Iterator[ScriptClassData]:
    """Import every script in order; yields the classes of scripts and operations each defines. One that fails is reported and skipped."""
    for file in list_scripts("scripts", ".py"):
        task = f"{end_of_path(file.path)} could not be loaded; startup continues without it"
        well, module = call_guest(partial(_import_one, file, basedir), task)
        if well:
            yield from _classes_of(module, file)


def _import_one(file: ScriptFile, basedir: Basedir) -> ModuleType:
    kept = list(sys.path)
    if file.basedir != str(SCRIPT_DIR):
        sys.path.insert(0, file.basedir)
    basedir.current = file.basedir
    try:
        return load_module(file.path)
    finally:
        sys.path[:] = kept
        basedir.current = str(SCRIPT_DIR)


def _classes_of(module: ModuleType, file: ScriptFile) -> Iterator[ScriptClassData]:
    for found in list(vars(module).values()):
        if not isinstance(found, type) or found in _BASES or not issubclass(found, (Script, ScriptPostprocessing)):
            continue
        if issubclass(found, Script):
            if found.title is Script.title:  # an intermediate base class of the extension
                continue
            for fault in find_faults(found, Script):
                log.warning("Script %s of %s: %s", found.__name__, end_of_path(file.path), fault)
        yield ScriptClassData(found, file.path, file.basedir, module)
