"""Whether a request is meant for this server, and whether a page of another site sent it.

A browser sends the name it looked up as `Host` and the site of the requesting page as `Origin`; a page can forge neither. If a foreign name could
lead here (DNS rebinding), a foreign page would count as this server's own. A foreign page can also send requests without reading the answers.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
LAN_SUFFIXES = (".local", ".localhost", ".lan", ".internal", ".home.arpa")
"""Nobody can buy a name with such an ending, so no foreign site has one."""
SAFE_METHODS = frozenset({"GET", "HEAD"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def split_host(text: str) -> tuple[str, int | None] | None:
    """`"[::1]:7860"` -> `("::1", 7860)`, lower case, without the trailing dot; None if it is not a host."""
    try:
        parts = urlsplit(f"//{text.strip()}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or parts.path or parts.query or parts.fragment or "@" in text:
        return None
    return host.lower().removesuffix("."), port


def is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


class OwnNames:
    """The names this server answers to. `allowed` adds more: `name`, `*.domain`, or `*` for every name."""

    def __init__(self, listen_host: str, allowed: Iterable[str] = (), *, any_name: bool = False) -> None:
        self.is_local = is_loopback(listen_host)
        self._any = any_name
        self._named: set[str] = set()
        self._suffixes: set[str] = set()
        self._own = {listen_host.lower(), *LOOPBACK_NAMES}
        if not self.is_local:
            self._own |= {socket.gethostname().lower(), socket.getfqdn().lower()} - {""}
        for name in allowed:
            self.add(name)

    def add(self, name: str) -> None:
        """Also answer to `name`, and treat its pages as this server's own."""
        name = name.strip().lower()
        if name == "*":
            self._any = True
        elif name.startswith("*."):
            self._suffixes.add(name[1:])
        elif name:
            parts = split_host(name)
            self._named.add(parts[0] if parts else name)

    def answers_to(self, host: str) -> bool:
        """Whether a request with this `Host` header is meant for this server."""
        parts = split_host(host)
        if parts is None:
            return False
        name = parts[0]
        if self._any or name in self._own or self.is_declared(name):
            return True
        if self.is_local:
            return is_loopback(name)
        return is_ip(name) or "." not in name or name.endswith(LAN_SUFFIXES)

    def is_declared(self, name: str) -> bool:
        """Whether the user declared the name with a flag."""
        return name in self._named or any(name.endswith(suffix) for suffix in self._suffixes)


class OwnSites:
    """The sites whose pages may send requests: this server's own, and those of the --cors-allow-origins flags."""

    def __init__(self, names: OwnNames, origins: Iterable[str] = (), origins_regex: str | None = None) -> None:
        self.names = names
        self._origins = frozenset(origins)
        self._pattern = re.compile(origins_regex) if origins_regex else None

    def is_allowed_elsewhere(self, origin: str) -> bool:
        """Whether a flag allows pages of this origin."""
        return "*" in self._origins or origin in self._origins or bool(self._pattern and self._pattern.fullmatch(origin))

    def is_own(self, origin: str, headers: Mapping[str, str]) -> bool:
        """Whether `origin` is the site the request was sent to. A proxy's X-Forwarded-Host counts: no foreign page can set it."""
        site = _site(origin)
        if site is None:
            return False
        if self.names.is_declared(site[0]):
            return True
        scheme = origin.partition(":")[0].lower()
        targets = (headers.get("host", ""), headers.get("x-forwarded-host", "").partition(",")[0])
        return any(site == _with_default_port(parts, scheme) for target in targets if target and (parts := split_host(target)))

    def is_foreign(self, method: str, headers: Mapping[str, str], *, is_page: bool) -> bool:
        """Whether a foreign page sent this request and may not. `is_page`: the path shows something and has no effect."""
        fetch_site = headers.get("sec-fetch-site", "")
        origin = headers.get("origin")
        if origin is not None:
            return not (fetch_site == "same-origin" or self.is_allowed_elsewhere(origin) or self.is_own(origin, headers))
        referrer = _origin_of(headers.get("referer", ""))
        if referrer and (self.is_allowed_elsewhere(referrer) or self.is_own(referrer, headers)):
            return False
        if fetch_site in ("cross-site", "same-site"):
            is_link = method in SAFE_METHODS and headers.get("sec-fetch-mode") == "navigate"
            return "*" not in self._origins and not (is_link and is_page)
        return method not in SAFE_METHODS and fetch_site not in ("same-origin", "none") and bool(referrer)


def _with_default_port(parts: tuple[str, int | None], scheme: str) -> tuple[str, int | None]:
    host, port = parts
    return host, port or _DEFAULT_PORTS.get(scheme)


def _site(origin: str) -> tuple[str, int | None] | None:
    """(host, port) of an origin; None for `null` and anything that is not an origin."""
    scheme, separator, rest = origin.partition("://")
    parts = split_host(rest) if separator else None
    return _with_default_port(parts, scheme.lower()) if parts else None


def _origin_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return f"{parts.scheme}://{parts.netloc}" if parts.scheme and parts.netloc else None
