"""Installers of extensions: each `install.py` runs once for each of its versions, before the program starts. Standard library only."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from modules.app_config import SCRIPT_DIR, AppConfig
from modules.launch.extension_folders import active_folders
from modules.launch.setup import Setup
from modules.launch.stamp import read_stamp, write_stamp

log = logging.getLogger(__name__)

BUILTIN_DIR = SCRIPT_DIR / "extensions-builtin"
_WATCHED_FILES = ("install.py", "requirements.txt")


def list_installers(config: AppConfig) -> list[Path]:
    """The `install.py` of every extension that is switched on, built-in ones first."""
    folders = active_folders(config.extensions_dir, config.settings_file, config.flags, builtin_dir=BUILTIN_DIR)
    return [folder / "install.py" for folder in folders if (folder / "install.py").is_file()]


def run_installers(config: AppConfig, setup: Setup) -> None:
    """Runs the installers that are new or changed. One that fails is reported, and the start goes on."""
    stamp = read_stamp(setup.stamp_path)
    done = dict(stamp)
    for script in list_installers(config):
        key, mark = f"extension:{script.parent}", _mark(script)
        if done.get(key) != mark and _run_installer(script, setup):
            done[key] = mark
    if done != stamp:
        try:
            write_stamp(setup.stamp_path, done)
        except OSError as error:
            log.warning("Writing %s failed (%s); installers of extensions run again next time", setup.stamp_path, error.strerror)


def _mark(script: Path) -> str:
    digest = hashlib.sha256(f"{sys.version_info[0]}.{sys.version_info[1]}".encode())
    for name in _WATCHED_FILES:
        path = script.parent / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _run_installer(script: Path, setup: Setup) -> bool:
    log.info("Running the installer of %s", script.parent.name)
    code = subprocess.run([sys.executable, str(script)], env=installer_environment(setup), cwd=SCRIPT_DIR, check=False).returncode
    if code != 0:
        log.warning("The installer of %s failed with code %d; the extension may not work.", script.parent.name, code)
    return code == 0


def installer_environment(setup: Setup) -> dict[str, str]:
    """What an installer sees: this program on its import path (`import launch`), and torch held at its version for pip."""
    environ: Mapping[str, str] = setup.environ
    path = [str(SCRIPT_DIR), *([environ["PYTHONPATH"]] if environ.get("PYTHONPATH") else [])]
    extra = {"PYTHONPATH": (";" if sys.platform == "win32" else ":").join(path)}
    if setup.constraints_path.exists():
        extra["PIP_CONSTRAINT"] = setup.constraints_path.absolute().as_uri()  # pip splits this variable at spaces
    return {**environ, **extra}
