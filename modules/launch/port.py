"""Checks that the server's address is free, before anything slow happens. Standard library only."""

from __future__ import annotations

import errno
import os
import socket

from modules.launch.errors import SetupError


def check_port(host: str, port: int) -> None:
    """Return if the server can listen on the address.

    Raises:
        SetupError: the port is taken or reserved, or the host is not this machine; the message says what to do.
    """
    error = _try_bind(host, port)
    if error is None:
        return
    if isinstance(error, socket.gaierror):
        raise SetupError(f"--server-name {host}: unknown host name ({error.strerror}). Use 127.0.0.1, 0.0.0.0 or an address of this machine.")
    if error.errno == errno.EADDRINUSE or getattr(error, "winerror", None) in (10013, 10048):
        free = _find_free(host, port + 1)
        other = f"start with --port {free}" if free else "start with another --port"
        raise SetupError(f"Port {port} is in use by another program (maybe an earlier start of this one). Stop that program, or {other}.")
    if error.errno == errno.EADDRNOTAVAIL:
        raise SetupError(f"--server-name {host}: this machine has no such address. Use 127.0.0.1, 0.0.0.0 or an address of this machine.")
    if error.errno in (errno.EACCES, errno.EPERM):
        raise SetupError(f"Port {port} needs administrator rights. Use a port above 1023, for example --port 7860.")
    raise SetupError(f"Cannot listen on {host} port {port}: {error.strerror or error}.")


def _try_bind(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name != "nt":  # on Windows it means "ignore old connections", not "share"
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _find_free(host: str, first: int, tries: int = 40) -> int | None:
    return next((port for port in range(first, min(first + tries, 65536)) if _try_bind(host, port) is None), None)
