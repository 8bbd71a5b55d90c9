"""Installs missing packages in an order that keeps torch unchanged; a stamp makes the next start fast.

Standard library only. argv and the environment are passed in.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modules.launch import pins as launch_pins
from modules.launch import pip
from modules.launch.errors import SetupError
from modules.launch.stamp import FILE_NAME, fingerprint, read_stamp, write_stamp

log = logging.getLogger(__name__)

MIN_FREE_BYTES = 2 * 2**30  # torch for the CPU and the rest; torch for CUDA takes about three times that
RUNTIME_FILE = "requirements_versions.txt"
TEST_FILE = "requirements_test.txt"
CLUSTER_FILE = "requirements_cluster.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What to install into the environment at `prefix`. The first file pins torch; the others are installed after it."""

    requirement_files: tuple[Path, ...]
    environ: Mapping[str, str]
    prefix: Path = Path(sys.prefix)
    skip_install: bool = False
    reinstall_torch: bool = False
    xformers: bool = False
    reinstall_xformers: bool = False

    @property
    def stamp_path(self) -> Path:
        return self.prefix / FILE_NAME

    @property
    def log_path(self) -> Path:
        return self.prefix / "webui-pip.log"

    @property
    def constraints_path(self) -> Path:
        """A pip constraints file that holds torch at the installed build and every other pinned package at its version."""
        return self.prefix / "webui-constraints.txt"

    def read_pins(self) -> dict[str, str]:
        """Package -> version for everything the requirements files pin. Raises SetupError for a missing file."""
        found: dict[str, str] = {}
        for path in self.requirement_files:
            found |= launch_pins.read_pins(pip.read_requirements(path).decode("utf-8-sig"))
        return found


def runtime_file(root_dir: Path, environ: Mapping[str, str]) -> Path:
    """`requirements_versions.txt`, or the file in REQS_FILE."""
    return root_dir / (environ.get("REQS_FILE") or RUNTIME_FILE)


def install_packages(setup: Setup) -> bool:
    """Install what the stamp does not cover. Returns True if pip ran for the requirements files.

    Raises:
        SetupError: an installation failed.
    """
    began_s = time.perf_counter()
    stamp = read_stamp(setup.stamp_path)
    contents = {path.name: pip.read_requirements(path) for path in setup.requirement_files}
    torch_line, _ = pip.split_torch(contents[setup.requirement_files[0].name].decode("utf-8-sig"))
    command = _choose_torch_command(setup, stamp, torch_line)
    marks = _marks(setup, contents, command)
    differing = _differing(setup, stamp, torch_line)
    if stamp.items() >= marks.items() and not setup.reinstall_torch and not differing:
        log.info("Packages match %s; nothing to install (%.2f s)", " and ".join(contents), time.perf_counter() - began_s)
        return False
    if setup.skip_install:
        found = "; ".join(f"{name} is {version or 'missing'}" for name, version in differing.items())
        log.warning("--skip-install: packages may differ from those of %s%s", " and ".join(contents), found and f": {found}")
        return False
    if differing and stamp.items() >= marks.items():
        log.warning("Packages were changed since the last start and are put back: %s", describe_differing(differing, setup.read_pins()))
    words = pip.split_pip_command(command) if command else []
    _save_stamp(setup, {key: mark for key, mark in stamp.items() if key.startswith("extension:")})  # in case this is interrupted
    _install_torch(setup, stamp, torch_line, words)
    _install_rest(setup, contents)
    _save_stamp(setup, {**read_stamp(setup.stamp_path), **marks, "torch_command": command})
    log.info("Packages installed in %.0f s", time.perf_counter() - began_s)
    return True


def _differing(setup: Setup, stamp: Mapping[str, str], torch_line: str | None) -> dict[str, str | None]:
    """Pinned packages whose installed version is wrong. Skips torch if the user requested a different one."""
    pins = setup.read_pins()
    if torch_line is None or torch_line not in stamp.get("torch_command", torch_line):
        pins.pop("torch", None)
    return launch_pins.differing(pins)


def describe_differing(differing: Mapping[str, str | None], pins: Mapping[str, str]) -> str:
    """Installed and needed version of each package, for the log."""
    return "; ".join(f"{name} is {version or 'missing'}, the program runs with {pins[name]}" for name, version in differing.items())


def put_back(setup: Setup, differing: Mapping[str, str | None]) -> None:
    """Reinstall pinned packages at their pinned versions, leaving torch as it is.

    Raises:
        SetupError: pip failed; the program would not run.
    """
    pins = setup.read_pins()
    words = [f"{name}=={pins[name]}" for name in differing]
    _pip(setup, ["install", "--prefer-binary", *words], ", ".join(words), setup.constraints_path if setup.constraints_path.exists() else None)


def take_off_misfits(setup: Setup) -> list[str]:
    """Uninstall a torchvision or torchaudio built for a different torch, which would break transformers. Returns what was removed."""
    misfits = launch_pins.misfits_of_torch()
    if misfits:
        _pip(setup, ["uninstall", "--yes", *misfits], "without " + ", ".join(misfits))
    return [f"{name} {version}" for name, version in misfits.items()]


def _marks(setup: Setup, contents: Mapping[str, bytes], command: str) -> dict[str, str]:
    """A mark for the first file, for the first two, and so on: installing the test extras also installs the packages before them."""
    names = [path.name for path in setup.requirement_files]
    groups = [names[: i + 1] for i in range(len(names))]
    return {"+".join(group): fingerprint({name: contents[name] for name in group}, command) for group in groups}


def _choose_torch_command(setup: Setup, stamp: Mapping[str, str], torch_line: str | None) -> str:
    """The current command. If none was requested, the one that worked last time, so that a CPU build is not silently replaced."""
    if torch_line is None and not setup.environ.get("TORCH_COMMAND"):
        return ""
    asked = setup.environ.get("TORCH_COMMAND") or setup.environ.get("TORCH_INDEX_URL")
    before = stamp.get("torch_command", "")
    if not asked and torch_line and torch_line in before:
        return before
    return pip.torch_command(torch_line or "torch", setup.environ, nvidia=pip.has_nvidia_driver())


def _install_torch(setup: Setup, stamp: Mapping[str, str], torch_line: str | None, words: list[str]) -> None:
    """Run pip with these words unless the pinned torch is installed. Another build of that version is replaced only on request."""
    if not words:
        return
    command = f"pip {' '.join(words)}"
    installed = pip.installed_version("torch")
    rebuild = setup.reinstall_torch or ("torch_command" in stamp and pip.split_pip_command(stamp["torch_command"]) != words)
    pinned = (torch_line or "").partition("==")[2].split(";")[0].strip()
    if installed and not rebuild and not setup.environ.get("TORCH_COMMAND") and (not pinned or installed.split("+")[0] == pinned):
        return
    _check_disk(setup.prefix)
    if installed and rebuild:
        _pip(setup, ["uninstall", "--yes", "torch"], "torch again")
    log.info("Installing torch (1 of 2): %s", command)
    if not pip.has_nvidia_driver() and "index" not in command and sys.platform == "linux":
        log.info(
            "No NVIDIA driver found. The default package may include CUDA (2.5 GB more). For CPU only, set TORCH_INDEX_URL=%s",
            pip.CPU_INDEX_HINT,
        )
    _pip(setup, words, "torch")


def _install_rest(setup: Setup, contents: Mapping[str, bytes]) -> None:
    """All other lines of all files in one pip call, with torch constrained to its version."""
    lines = [line for content in contents.values() for line in pip.split_torch(content.decode("utf-8-sig"))[1]]
    log.info("Installing packages (2 of 2): %s", " and ".join(contents))
    constraints = write_constraints(setup, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _pip(setup, ["install", "--prefer-binary", "-r", str(path)], " and ".join(contents), constraints)


def write_constraints(setup: Setup, pins: Mapping[str, str]) -> Path | None:
    """Write the constraints file: torch, its companions, and the installed ones of `pins`. Returns None if it cannot be written."""
    lines = launch_pins.constraints(pins)
    if not lines:
        return None
    try:
        setup.constraints_path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    except OSError as error:
        log.warning("Writing %s failed (%s); packages are not held at their versions", setup.constraints_path, error.strerror)
        return None
    return setup.constraints_path


def _pip(setup: Setup, arguments: list[str], asked: str, constraints: Path | None = None) -> None:
    pip.run_pip(arguments, asked=asked, log_path=setup.log_path, environ=setup.environ, constraints=constraints)


def _check_disk(folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < MIN_FREE_BYTES:
        raise SetupError(
            f"Installing torch needs at least {MIN_FREE_BYTES / 2**30:.0f} GB, but only {free_bytes / 2**30:.1f} GB are free at {folder}. "
            "Free some space, or set VENV_DIR to a folder on another disk."
        )


def _save_stamp(setup: Setup, entries: Mapping[str, str]) -> None:
    try:
        write_stamp(setup.stamp_path, entries)
    except OSError as error:
        log.warning("Writing %s failed (%s); the next start will run pip again", setup.stamp_path, error.strerror)


def install_xformers(setup: Setup) -> None:
    """Install the xformers built for the installed torch, without dependencies so that torch stays. A failure only costs speed."""
    torch_version = pip.installed_version("torch")
    installed = pip.installed_version("xformers")
    requirement = pip.xformers_requirement(torch_version or "0", setup.environ)
    if requirement is None:
        log.warning("--xformers: no known xformers for torch %s; torch's own attention is used. Set XFORMERS_PACKAGE to choose one.", torch_version)
        return
    fits = installed is not None and ("==" not in requirement or installed.split("+")[0] == requirement.partition("==")[2])
    if setup.skip_install or (fits and not setup.reinstall_xformers):
        return
    log.info("Installing %s for torch %s", requirement, torch_version)
    again = ["--force-reinstall"] if setup.reinstall_xformers else []
    try:
        _pip(setup, ["install", "--no-deps", "--prefer-binary", *again, requirement], "xformers")
    except SetupError as error:
        log.warning("%s Torch's own attention is used.", error)
