"""Everything `launch.py` does before the program runs, in one call, and the helpers that extension installers import from it.

Standard library only. `launch.py` passes in argv and the environment.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from modules.app_config import SCRIPT_DIR, AppConfig
from modules.jobs.current import current_job_id
from modules.launch import venv as launch_venv
from modules.launch.cmd_args import FlagError, parse_config
from modules.launch.env import library_environment
from modules.launch.errors import SetupError
from modules.launch.extensions import run_installers
from modules.launch.pins import find_refusals, leave_out, names_a_requirement
from modules.launch.port import check_port
from modules.launch.setup import CLUSTER_FILE, Setup, install_packages, install_xformers, runtime_file
from modules.launch.stamp import FILE_NAME
from modules.launch.sysinfo import write_sysinfo
from modules.launch.timer import startup_timer
from modules.launch.version import program_version

log = logging.getLogger(__name__)

BEGAN_VARIABLE = "WEBUI_BEGAN_S"
script_path = str(SCRIPT_DIR)
python = sys.executable

__all__ = [
    "SetupError",
    "commit_hash",
    "git_clone",
    "git_tag",
    "is_installed",
    "library_environment",
    "prepare",
    "run",
    "run_pip",
    "setup_logging",
    "stamp_path",
]


_CONTROLS = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160)) if chr(number) not in "\n\t"}
_CONTROLS |= {number: f"\\u{number:04x}" for number in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))}
CONTINUED = "    | "
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def escape_record(text: str) -> str:
    """The text of a log record, made safe: text from clients cannot start a new log line or send control codes to the terminal."""
    return text.translate(_CONTROLS).replace("\n", f"\n{CONTINUED}")


class _PlainFormatter(logging.Formatter):
    """INFO as is; anything above with its level; with DEBUG also its origin."""

    def format(self, record: logging.LogRecord) -> str:
        text = escape_record(super().format(record))
        is_plain = record.levelno == logging.INFO and not text.lstrip().startswith(_LEVELS)
        return text if is_plain else f"{record.levelname}: {text}"


class _JsonFormatter(logging.Formatter):
    """One JSON object per record, with the id of the job that it is about."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(timespec="milliseconds")
        facts = {"time": moment, "level": record.levelname, "logger": record.name, "job": current_job_id.get(), "message": record.getMessage()}
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        return json.dumps(facts)


def setup_logging(level: str, log_format: str = "text") -> None:
    """Install one handler on standard output, replacing that of an earlier call. `log_format`: "text" or "json"."""
    handler = logging.StreamHandler(sys.stdout)
    handler.set_name("webui")
    plain = _PlainFormatter("%(name)s: %(message)s" if level == "DEBUG" else "%(message)s")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else plain)
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == "webui"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    if level == "DEBUG":  # debug output of other libraries is not about this program
        for name in ("httpx", "httpcore", "asyncio", "matplotlib", "PIL", "urllib3", "multipart", "filelock"):
            logging.getLogger(name).setLevel("INFO")
    else:
        logging.getLogger("httpx").setLevel("WARNING")


def prepare(argv: Sequence[str], environ: Mapping[str, str], script: Path) -> AppConfig | int:
    """Everything up to the program itself: flags, virtual environment, packages. Returns the configuration, or an exit code.

    May restart `script` inside the virtual environment, so the first call may not return at all.
    """
    if BEGAN_VARIABLE in environ:
        startup_timer.restart(float(environ[BEGAN_VARIABLE]))
    try:
        config = parse_config(argv, environ)
        setup_logging(config.loglevel, config.log_format)
        return _prepare(config, argv, environ, script)
    except FlagError as error:
        setup_logging("INFO")
        log.error("%s", error)
        return 2
    except SetupError as error:
        log.error("%s", error)
        return 1


def _prepare(config: AppConfig, argv: Sequence[str], environ: Mapping[str, str], script: Path) -> AppConfig | int:
    flags = config.flags
    if not flags["skip_prepare_environment"]:
        code = enter_venv(argv, environ, script, make=not (flags["skip_install"] or flags["dump_sysinfo"]))
        if code is not None:
            return code
    for notice in config.notices:
        log.warning("%s", notice)
    if flags["dump_sysinfo"]:
        log.info("Written: %s", write_sysinfo(config, environ))
        return 0
    if not (flags["exit"] or config.list_gpus):
        check_port(config.host, config.listen_port)
    if not flags["skip_prepare_environment"]:
        _prepare_packages(config, environ)
    startup_timer.record("set-up")
    return 0 if flags["exit"] else config


def enter_venv(argv: Sequence[str], environ: Mapping[str, str], script: Path, *, make: bool) -> int | None:
    """Continue inside the virtual environment, created first if `make`. None means: continue in this process.

    Raises:
        SetupError: it cannot be created or entered.
    """
    venv_dir = launch_venv.choose_dir(SCRIPT_DIR, environ)
    if venv_dir is None or launch_venv.is_inside(environ):
        return None
    if make:
        launch_venv.make_venv(venv_dir)
    elif not launch_venv.python_path(venv_dir).exists():
        return None
    began = environ.get(BEGAN_VARIABLE, str(startup_timer.began_s))
    return launch_venv.run_inside(venv_dir, script, argv, {**environ, BEGAN_VARIABLE: began})


def _prepare_packages(config: AppConfig, environ: Mapping[str, str]) -> None:
    flags = config.flags
    runtime = runtime_file(SCRIPT_DIR, environ)
    setup = Setup(
        requirement_files=(runtime,) if config.cluster is None else (runtime, SCRIPT_DIR / CLUSTER_FILE),
        environ=environ,
        skip_install=flags["skip_install"],
        reinstall_torch=flags["reinstall_torch"],
        xformers=flags["xformers"],
        reinstall_xformers=flags["reinstall_xformers"],
    )
    install_packages(setup)
    if setup.xformers or setup.reinstall_xformers:
        install_xformers(setup)
    if not (setup.skip_install or flags["no_install_extensions"]):
        run_installers(config, setup)


def stamp_path() -> Path:
    """The record of what was installed; without it the next start runs pip."""
    return Path(sys.prefix) / FILE_NAME


# Names that extension installers import, as in A1111 and Forge.


def is_installed(package: str) -> bool:
    """Whether a distribution or module of this name is installed; imports nothing."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        try:
            return importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            return False
    return True


def run(command: str, desc: str | None = None, errdesc: str | None = None, custom_env: Mapping[str, str] | None = None, live: bool = False) -> str:
    """Run a shell command and return its output, or "" if `live` shows the output instead.

    Raises:
        RuntimeError: nonzero exit code; the message contains the output.
    """
    if desc is not None:
        log.info("%s", desc)
    env = None if custom_env is None else dict(custom_env)
    result = subprocess.run(command, shell=True, env=env, check=False, capture_output=not live, text=True, encoding="utf-8", errors="replace")
    if result.returncode != 0:
        parts = [f"{errdesc or 'Running a command failed'}.", f"Command: {command}", f"Error code: {result.returncode}"]
        parts += [f"{name}: {text}" for name, text in (("stdout", result.stdout), ("stderr", result.stderr)) if text]
        raise RuntimeError("\n".join(parts))
    return result.stdout or ""


def run_pip(command: str, desc: str | None = None, live: bool = False, index_url: str = "", skip_install: bool = False) -> str | None:
    """Runs `pip COMMAND`, unless nothing is to be installed. Requirements that would replace a package of the program are left out and named.

    Raises:
        RuntimeError: pip failed; the message contains its output.
    """
    if skip_install:
        return None
    index = f" --index-url {shlex.quote(index_url)}" if index_url else ""
    title = f"Installing {desc}" if desc else None
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                return run(f'"{sys.executable}" -m pip {command} --prefer-binary{index}', desc=title, errdesc=f"Could not install {desc}", live=live)
            except (
                RuntimeError
            ) as error:  # constraints of the program may be why: then again without what they exclude; the launcher says what that was
                words, title = _split_words(command), None
                fewer = leave_out(words, find_refusals(str(error)), Path(folder))
                if fewer == words:
                    raise
                if not names_a_requirement(fewer):
                    return ""
                command = " ".join(word if sys.platform == "win32" else shlex.quote(word) for word in fewer)


def _split_words(command: str) -> list[str]:
    return shlex.split(command, posix=sys.platform != "win32")


def _git(*arguments: str, folder: Path = SCRIPT_DIR) -> str:
    """Output of a git command.

    Raises:
        RuntimeError: git is missing or failed.
    """
    git = shutil.which("git")
    if git is None:
        raise RuntimeError("git is not installed, or not on the PATH. Install it with your system's package manager or from https://git-scm.com.")
    result = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"git {' '.join(arguments)} in {folder} failed: {result.stderr.strip()}")
    return result.stdout.strip()


def commit_hash() -> str:
    """The commit of this program, or `<none>` outside a clone."""
    try:
        return _git("rev-parse", "HEAD")
    except RuntimeError:
        return "<none>"


def git_tag() -> str:
    """The program's version; in a clone followed by -g and the short commit, as `git describe` writes it. It starts with Forge's "f2"."""
    try:
        return f"{program_version()}-g{_git('rev-parse', '--short', 'HEAD')}"
    except RuntimeError:
        return program_version()


def git_clone(url: str, dir: str, name: str, commithash: str | None = None) -> None:
    """Clone into a folder, or bring an existing clone to the requested commit.

    Raises:
        RuntimeError: git failed; an incomplete clone is removed.
    """
    folder = Path(dir)
    if not folder.exists():
        log.info("Cloning %s into %s", name, folder)
        draft = folder.with_name(f"{folder.name}.{time.time_ns()}.part")
        try:
            _git("clone", "--config", "core.filemode=false", url, str(draft))
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if commithash is None or _git("rev-parse", "HEAD", folder=folder) == commithash:
        return
    _git("fetch", folder=folder)
    _git("checkout", commithash, folder=folder)
