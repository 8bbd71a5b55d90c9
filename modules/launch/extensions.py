"""Installers of extensions: each version of an `install.py` runs once, before the program starts. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from modules.app_config import SCRIPT_DIR, AppConfig
from modules.launch.extension_folders import active_folders
from modules.launch.pins import differing, find_refusals
from modules.launch.setup import Setup, describe_differing, put_back, take_off_misfits, write_constraints
from modules.launch.stamp import read_stamp, write_stamp

log = logging.getLogger(__name__)

BUILTIN_DIR = SCRIPT_DIR / "extensions-builtin"
MAX_LOG_CHARACTERS = 2_000_000
_WATCHED_FILES = ("install.py", "requirements.txt")


def list_installers(config: AppConfig) -> list[Path]:
    """The `install.py` of every enabled extension, built-in ones first."""
    folders = active_folders(config.extensions_dir, config.settings_file, config.flags, builtin_dir=BUILTIN_DIR)
    return [folder / "install.py" for folder in folders if (folder / "install.py").is_file()]


def run_installers(config: AppConfig, setup: Setup) -> None:
    """Runs the installers that are new or changed. One that fails is reported, and the start goes on.

    Raises:
        SetupError: an installer changed a package that the program needs, and it cannot be put back.
    """
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
            log.warning("Writing %s failed (%s); extension installers will run again next time", setup.stamp_path, error.strerror)


def _mark(script: Path) -> str:
    digest = hashlib.sha256(f"{sys.version_info[0]}.{sys.version_info[1]}".encode())
    for name in _WATCHED_FILES:
        path = script.parent / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _run_installer(script: Path, setup: Setup) -> bool:
    name, pins = script.parent.name, setup.read_pins()
    changed_before = differing(pins)
    write_constraints(setup, pins)
    log.info("Running the installer of %s", name)
    pip_log = setup.prefix / "webui-installer-pip.log"
    with contextlib.suppress(OSError):
        pip_log.unlink(missing_ok=True)
    code = subprocess.run([sys.executable, str(script)], env=installer_environment(setup, pip_log), cwd=SCRIPT_DIR, check=False).returncode
    for refusal in find_refusals(_read_end(pip_log)):
        log.warning("The installer of %s was %s.", name, refusal)
    if code != 0:
        log.warning("The installer of %s failed with code %d; the extension may not work.", name, code)
    _restore(setup, name, pins, changed_before)
    return code == 0


def _read_end(pip_log: Path) -> str:
    try:
        return pip_log.read_text(encoding="utf-8", errors="replace")[-MAX_LOG_CHARACTERS:]
    except OSError:
        return ""


def _restore(setup: Setup, name: str, pins: Mapping[str, str], changed_before: Mapping[str, str | None]) -> None:
    """Undo changes to pinned packages that the installer of `name` made despite pip's constraints."""
    importlib.invalidate_caches()
    changed = {package: version for package, version in differing(pins).items() if package not in changed_before}
    if changed:
        log.warning("The installer of %s changed packages, which are put back: %s.", name, describe_differing(changed, pins))
        put_back(setup, changed)
    if removed := take_off_misfits(setup):
        log.warning("The installer of %s brought %s, made for another torch; it is taken off again.", name, " and ".join(removed))


def installer_environment(setup: Setup, pip_log: Path) -> dict[str, str]:
    """The environment of an installer: `import launch` works, and pip has every pinned package as a constraint and writes a log."""
    environ: Mapping[str, str] = setup.environ
    path = [str(SCRIPT_DIR), *([environ["PYTHONPATH"]] if environ.get("PYTHONPATH") else [])]
    extra = {"PYTHONPATH": (";" if sys.platform == "win32" else ":").join(path), "PIP_LOG": str(pip_log)}
    if setup.constraints_path.exists():
        extra["PIP_CONSTRAINT"] = setup.constraints_path.absolute().as_uri()  # pip splits this variable at spaces
    return {**environ, **extra}
