"""Output of pip, venv and the system, turned into messages a user can act on. The samples are real output of those programs."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from modules.launch.errors import explain_os_error, explain_pip_failure, explain_venv_failure, quote_command

LOG = Path("pip.log")

NO_NETWORK = """
WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by 'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection
object at 0x7f>: Failed to establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)
ERROR: No matching distribution found for torch==2.13.0
"""
NO_SPACE = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
NO_SPACE_WINDOWS = "ERROR: Could not install packages due to an OSError: [WinError 112] There is not enough space on the disk: 'C:\\\\x'"
NO_VERSION = """
ERROR: Could not find a version that satisfies the requirement tiny==9 (from versions: 1.0)
ERROR: No matching distribution found for tiny==9
"""
NO_BUILD = "  error: subprocess-exited-with-error\n  ERROR: Failed building wheel for basicsr\nERROR: Could not build wheels for basicsr"
NO_BUILD_NEW = "ERROR: Failed to build installable wheels for some pyproject.toml based projects (basicsr)"
CONFLICT = "ERROR: ResolutionImpossible: for help visit https://pip.pypa.io"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (NO_NETWORK, "the package index cannot be reached"),
        ("ProxyError('Cannot connect to proxy.')", "HTTPS_PROXY"),
        (NO_SPACE, "the disk is full"),
        (NO_SPACE_WINDOWS, "the disk is full"),
        (NO_SPACE + NO_NETWORK, "the disk is full"),
        (NO_VERSION, "the index has no tiny==9 for Python 3."),
        (NO_BUILD, "basicsr has no ready-made wheel"),
        (NO_BUILD_NEW, "basicsr has no ready-made wheel"),
        (CONFLICT, "incompatible versions"),
        ("hello\nERROR: something new\n", "Last error: ERROR: something new"),
        ("", "Last error: (none)"),
    ],
)
def test_pip(text: str, says: str) -> None:
    message = explain_pip_failure(text, "torch", LOG)
    assert message.startswith("Installing torch failed: ")
    assert says in message
    assert message.endswith("pip.log")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("The virtual environment was not created successfully because ensurepip is not available.", "apt install python3-venv"),
        ("No module named ensurepip", "apt install python3-venv"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("PermissionError: [Errno 13] Permission denied: '/x/venv'", "is not writable"),
        ("a\nb", "failed: b"),
        ("", "no message"),
    ],
)
def test_venv(text: str, says: str) -> None:
    assert says in explain_venv_failure(text, Path("venv"), 2**40)


def test_a_venv_on_a_full_disk() -> None:
    """If pip's installer fails for lack of space, Python's message does not say so."""
    text = "Error: Command '['/small/venv/bin/python', '-m', 'ensurepip', '--upgrade', '--default-pip']' returned non-zero exit status 2."
    assert "the disk is full" in explain_venv_failure(text, Path("venv"), 10 * 2**20)
    assert "returned non-zero exit status 2" in explain_venv_failure(text, Path("venv"), 2**40)


@pytest.mark.parametrize(
    ("code", "says"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission denied (x)"), (errno.EIO, "Writing: Input/output error.")],
)
def test_the_system(code: int, says: str) -> None:
    assert says in explain_os_error(OSError(code, "Input/output error", "x"), "Writing")


def test_commands_can_be_typed() -> None:
    assert quote_command(["a b", "c"]) == '"a b" c'
