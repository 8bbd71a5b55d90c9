"""Fetches a picture from a client's URL without giving the client access to the network behind the server.

All addresses of a host name must be public, the connection goes to exactly the checked address (a second lookup could return another), and
each redirect is checked again. Must not know pictures or settings.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from modules.api.limits import MAX_DOWNLOAD_BYTES
from modules.errors import RequestError

TIMEOUT_S = 30.0
MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)


class FetchError(RequestError):
    """The URL is not allowed, or did not return a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchRules:
    """`allow_local` also permits addresses of this machine and its network."""

    allow_local: bool = False
    user_agent: str = ""
    max_bytes: int = MAX_DOWNLOAD_BYTES
    timeout_s: float = TIMEOUT_S


fetch_deadline: ContextVar[list[float] | None] = ContextVar("fetch_deadline", default=None)
"""Deadline of all fetches of the current request; set by the first one."""


def _deadline(rules: FetchRules) -> float:
    shared = fetch_deadline.get()
    mine = time.monotonic() + rules.timeout_s
    if shared is None:
        return mine
    if not shared:
        shared.append(mine)
    return shared[0]


def fetch(url: str, rules: FetchRules) -> bytes:
    """The file at an http(s) URL. All files of a request share `rules.timeout_s`. Raises FetchError."""
    deadline = _deadline(rules)
    for _ in range(MAX_REDIRECTS + 1):
        status, location, body = _request(url, rules, deadline)
        if status in _REDIRECTS and location:
            url = urljoin(url, location)
            continue
        if status != 200:
            raise FetchError(f"{_shown(url)} returned status {status}; use the URL of a picture.")
        return body
    raise FetchError(f"{_shown(url)}: more than {MAX_REDIRECTS} redirects.")


def _shown(url: str) -> str:
    return url if len(url) <= 200 else f"{url[:200]}..."


def resolve(host: str, port: int, *, allow_local: bool) -> str:
    """One address of `host`. Raises FetchError if it has none, or if any of them is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError(f"the host {host!r} cannot be resolved; use another URL or send the picture as base64.") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_local and not all(is_public(address) for address in addresses):
        reason = "such URLs are not fetched (setting api_forbid_local_requests)"
        raise FetchError(f"{host!r} is an address in the server's own network; {reason}.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # an IPv4 address behind NAT64
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _parse(url: str) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise FetchError(f"{_shown(url)!r} is not a URL.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError(f"{_shown(url)!r} is not an http or https URL.")
    return parts, port or (443 if parts.scheme == "https" else 80)


def _request(url: str, rules: FetchRules, deadline: float) -> tuple[int, str | None, bytes]:
    parts, port = _parse(url)
    host = parts.hostname or ""
    address = resolve(host, port, allow_local=rules.allow_local)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    sockets: list[socket.socket] = []
    ender = threading.Timer(_seconds_left(deadline), _end, [sockets])
    ender.daemon = True
    ender.start()
    try:
        connection = _connect(parts.scheme, host, address, port, _seconds_left(deadline), sockets)
        try:
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", parts.netloc.rpartition("@")[2])
            connection.putheader("User-Agent", rules.user_agent or "Mozilla/5.0")
            connection.putheader("Accept", "image/*,*/*;q=0.5")
            connection.endheaders()
            response = connection.getresponse()
            body = _read(response, rules.max_bytes, deadline, url)
            _seconds_left(deadline)  # a response cut off by `_end` looks complete
            return response.status, response.getheader("Location"), body
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "it takes too long" if time.monotonic() >= deadline else str(error)
        raise FetchError(f"{_shown(url)} cannot be fetched: {reason}.") from error
    finally:
        ender.cancel()


def _end(sockets: list[socket.socket]) -> None:
    """Time is up: everything waiting on these sockets gets an error. A socket's own timeout restarts with every byte received."""
    for sock in list(sockets):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise FetchError("fetching the pictures of this request takes too long; send them as base64.")
    return left


def _connect(scheme: str, host: str, address: str, port: int, timeout_s: float, sockets: list[socket.socket]) -> http.client.HTTPConnection:
    """A connection to `address` on behalf of `host`; its sockets are appended to `sockets`."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    sock = socket.create_connection((address, port), timeout=timeout_s)
    sockets.append(sock)
    if scheme == "https":
        try:
            secure = ssl.create_default_context().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            sock = secure
            sockets.append(secure)
            secure.do_handshake()
        except BaseException:
            sock.close()
            raise
    connection.sock = sock
    return connection


def _read(response: http.client.HTTPResponse, max_bytes: int, deadline: float, url: str) -> bytes:
    chunks: list[bytes] = []
    total_bytes = 0
    while chunk := response.read(_CHUNK_BYTES):
        total_bytes += len(chunk)
        if total_bytes > max_bytes:
            raise FetchError(f"{_shown(url)} is larger than {max_bytes >> 20} MiB; use a smaller picture.")
        _seconds_left(deadline)
        chunks.append(chunk)
    return b"".join(chunks)
