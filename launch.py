"""Startup: checks the Python version, creates the virtual environment, installs packages, parses the command line once, and runs the program.

The user's Python may be of any version, so this file uses only syntax that all versions can parse; otherwise it could not report an old one.
Extensions import `is_installed, run_pip, run, git_clone, git_tag, args` from here. argv and the environment are read only here.
"""

import os
import sys

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 13)


def python_problem(version, bits, words):
    """Why this Python cannot run the program, in plain words; None if it can, or if the words disable the check."""
    if "--skip-python-version-check" in words and version >= (3, 10):
        return None
    name = "%d.%d" % version[:2]
    get = "Install Python 3.10 to 3.13 (64 bit) from https://www.python.org/downloads/ or your system's packages and start with it, for example: "
    example = "py -3.11 launch.py" if os.name == "nt" else "python3.11 launch.py"
    if tuple(version[:2]) < OLDEST_PYTHON:
        return "Python %s is too old for this program. %s%s" % (name, get, example)
    if tuple(version[:2]) > NEWEST_PYTHON:
        return "Python %s is newer than this program supports. %s%s (or try it with --skip-python-version-check)" % (name, get, example)
    if bits < 64:
        return "This is a 32-bit Python, for which there is no torch. %s%s" % (get, example)
    return None


def check_python():
    """Exit with a plain message if this Python is unsuitable."""
    words = sys.argv + os.environ.get("COMMANDLINE_ARGS", "").split()
    problem = python_problem(tuple(sys.version_info[:3]), 64 if sys.maxsize > 2**32 else 32, words)
    if problem is not None:
        print("ERROR: " + problem)
        sys.exit(1)


if __name__ == "__main__" or sys.version_info[:2] < OLDEST_PYTHON:
    check_python()

# From here on the Python version is known to be suitable.

import logging
import pathlib
import signal
import threading

from modules.launch import start
from modules.launch.start import git_clone, git_tag, is_installed, prepare, run  # noqa: F401 -- extensions import them from here

log = logging.getLogger("launch")


def __getattr__(name):
    """`args`, the flags as extensions read them: parsed from this process's argv on first access."""
    if name not in ("args", "skip_install", "index_url"):
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    if name == "index_url":
        return os.environ.get("INDEX_URL", "")
    from argparse import Namespace

    from modules.launch.cmd_args import parse_config

    environ = dict(os.environ, IGNORE_CMD_ARGS_ERRORS="1")  # flags of the main process may belong to extensions
    flags = Namespace(**parse_config(sys.argv[1:], environ).flags)
    globals().update(args=flags, skip_install=flags.skip_install)
    return globals()[name]


def run_pip(command, desc=None, live=False):
    """Run `pip COMMAND` for an extension, unless --skip-install was given."""
    index_url = os.environ.get("INDEX_URL", "")
    return start.run_pip(command, desc, live, index_url=index_url, skip_install=__getattr__("args").skip_install)


def run_program(config):
    """Import and run the program; returns its exit code. Distinguishes a missing package from a bug in the program."""
    os.environ.update(start.library_environment(config, os.environ))
    try:
        import webui
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("webui", "modules", "modules_forge", "backend"):
            raise
        log.error("The package %s is missing. Delete %s and run this again without --skip-install.", error.name, start.stamp_path())
        return 1
    return webui.main(config)


class Ending:
    """Handles a termination signal (`kill`, a service manager) or Ctrl+C by shutting down cleanly. A second one ends the process at once."""

    def __init__(self):
        self.asked = False

    def __call__(self, signum, frame):
        if self.asked:
            os.write(2, b"Stopped at once.\n")
            os._exit(128 + signum)
        self.asked = True
        raise KeyboardInterrupt


def leave(code):
    """End the process with `code`. A thread still inside a library's native code would crash the interpreter's normal shutdown."""
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if left:
        log.debug("Threads that still run: %s", ", ".join(left))
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main():
    """Run everything; returns the exit code."""
    ending = Ending()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending)
    try:
        result = prepare(sys.argv[1:], os.environ, pathlib.Path(__file__).resolve())
        return result if isinstance(result, int) else run_program(result)
    except KeyboardInterrupt:
        log.info("Stopped.")
        return 130
    except Exception:  # one of the four walls
        log.exception("The program crashed because of a bug. `python launch.py --dump-sysinfo` writes a file to attach to a bug report.")
        return 1


if __name__ == "__main__":
    leave(main())
