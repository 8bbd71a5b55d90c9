"""Fetching a picture that a client names by URL, without becoming its way into the network behind the server.

Every address a name resolves to has to be public, the connection goes to the very address that was checked (a second look-up could answer
otherwise), and each redirect is checked anew. Must not know pictures or settings.
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
    """The URL may not be fetched, or it gave no file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchRules:
    """`allow_local` also lets through addresses of this machine and its network."""

    allow_local: bool = False
    user_agent: str = ""
    max_bytes: int = MAX_DOWNLOAD_BYTES
    timeout_s: float = TIMEOUT_S


fetch_deadline: ContextVar[list[float] | None] = ContextVar("fetch_deadline", default=None)
"""When all fetches of the request being served have to be over; set with the first of them."""


def _deadline(rules: FetchRules) -> float:
    shared = fetch_deadline.get()
    mine = time.monotonic() + rules.timeout_s
    if shared is None:
        return mine
    if not shared:
        shared.append(mine)
    return shared[0]


def fetch(url: str, rules: FetchRules) -> bytes:
    """The file at an http(s) URL. All files of one request have `rules.timeout_s` together. Raises FetchError."""
    deadline = _deadline(rules)
    for _ in range(MAX_REDIRECTS + 1):
        status, location, body = _request(url, rules, deadline)
        if status in _REDIRECTS and location:
            url = urljoin(url, location)
            continue
        if status != 200:
            raise FetchError(f"{_shown(url)} answered {status}; give the URL of a picture.")
        return body
    raise FetchError(f"{_shown(url)}: more than {MAX_REDIRECTS} redirects.")


def _shown(url: str) -> str:
    return url if len(url) <= 200 else f"{url[:200]}..."


def resolve(host: str, port: int, *, allow_local: bool) -> str:
    """One address of `host`. Raises FetchError when it has none, or when any of them is not public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise FetchError(f"the host {host!r} cannot be found; give another URL or the picture itself as base64.") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_local and not all(is_public(address) for address in addresses):
        reason = "URLs of such addresses are not fetched (setting api_forbid_local_requests)"
        raise FetchError(f"{host!r} is an address of the server's own network; {reason}.")
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
            _seconds_left(deadline)  # what `_end` cut off looks like a whole answer
            return response.status, response.getheader("Location"), body
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "it takes too long" if time.monotonic() >= deadline else str(error)
        raise FetchError(f"{_shown(url)} cannot be fetched: {reason}.") from error
    finally:
        ender.cancel()


def _end(sockets: list[socket.socket]) -> None:
    """The time is over: whatever waits for these gets an error. A socket's own time-out begins anew with every byte that drips in."""
    for sock in list(sockets):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise FetchError("the pictures of this request take too long to fetch; send them as base64.")
    return left


def _connect(scheme: str, host: str, address: str, port: int, timeout_s: float, sockets: list[socket.socket]) -> http.client.HTTPConnection:
    """A connection to `address`, which speaks for `host`; its sockets are put into `sockets`."""
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
            raise FetchError(f"{_shown(url)} holds more than {max_bytes >> 20} MiB; give a smaller picture.")
        _seconds_left(deadline)
        chunks.append(chunk)
    return b"".join(chunks)
