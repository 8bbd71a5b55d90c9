"""An address that is taken, unknown or not local is reported with a remedy."""

from __future__ import annotations

import re
import socket

import pytest

from modules.launch import port as launch_port
from modules.launch.errors import SetupError
from modules.launch.port import check_port


def test_a_free_port_is_fine() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_named_with_a_free_one(host: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SetupError, match=f"Port {port} is in use") as caught:
            check_port(host, port)
        free = int(re.findall(r"--port (\d+)", str(caught.value))[0])
        assert free > port
        check_port(host, free)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(SetupError, match="no such address"):
        check_port("192.0.2.1", 17860)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "unknown host name"),
        (PermissionError(13, "Permission denied"), "above 1023"),
        (OSError(5, "Input/output error"), "Cannot listen on h port 80: Input/output error"),
    ],
)
def test_other_reasons_are_told_apart(error: OSError, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_port, "_try_bind", lambda host, port: error)
    with pytest.raises(SetupError, match=says):
        check_port("h", 80)
