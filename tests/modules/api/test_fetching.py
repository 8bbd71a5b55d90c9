from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from PIL import Image

from modules.api import fetching
from modules.api.api import verify_url
from modules.api.fetching import FetchError, FetchRules, fetch, is_public, resolve
from tests.modules.api.conftest import Server, from_base64, to_base64

LOCAL = FetchRules(allow_local=True, user_agent="tester")


class Site(BaseHTTPRequestHandler):
    """A small site on the loopback address."""

    picture: ClassVar[bytes] = b""
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Site.seen.append(f"{self.path} {self.headers['Host']} {self.headers['User-Agent']}")
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        body = bytes(5000) if self.path == "/large" else Site.picture
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing to the console."""


@pytest.fixture
def site() -> Iterator[str]:
    import base64

    Site.picture = base64.b64decode(to_base64(Image.new("RGB", (24, 16), "red")))
    Site.seen.clear()
    with HTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_file_is_fetched_with_host_and_agent(site: str) -> None:
    assert fetch(f"{site}/a.png?size=1", LOCAL) == Site.picture
    assert Site.seen == [f"/a.png?size=1 {site.removeprefix('http://')} tester"]


def test_redirects_are_followed_and_each_is_checked(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(f"{site}/to//a.png", LOCAL) == Site.picture
    with pytest.raises(FetchError, match="more than 5 redirects"):
        fetch(f"{site}/to//to//to//to//to//to//to//a.png", LOCAL)
    with pytest.raises(FetchError, match="is not an http or https URL"):
        fetch(f"{site}/to/file:///etc/passwd", LOCAL)
    public = socket.getaddrinfo

    def first_host_is_public(host: str, *arguments: Any, **keywords: Any) -> Any:
        return public("127.0.0.1" if host == "pictures.example" else host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", first_host_is_public)
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    port = site.rsplit(":", 1)[1]
    assert fetch(f"http://pictures.example:{port}/a.png", FetchRules()) == Site.picture
    monkeypatch.setattr(fetching, "is_public", lambda address: False)
    with pytest.raises(FetchError, match="own network"):
        fetch(f"http://pictures.example:{port}/a.png", FetchRules())


def test_what_is_too_large_gone_or_unreachable_is_said(site: str) -> None:
    with pytest.raises(FetchError, match="is larger than"):
        fetch(f"{site}/large", FetchRules(allow_local=True, max_bytes=1000))
    with pytest.raises(FetchError, match="returned status 404"):
        fetch(f"{site}/gone", LOCAL)
    with pytest.raises(FetchError, match="cannot be fetched"):
        fetch("http://127.0.0.1:1/x", LOCAL)


@pytest.mark.parametrize("url", ["ftp://example.org/x", "http://", "file:///etc/passwd", "http://[::1", "http://host:port/", "javascript:1"])
def test_what_is_no_http_url(url: str) -> None:
    with pytest.raises(FetchError):
        fetch(url, LOCAL)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::7f00:1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_a_name_with_one_local_address_among_public_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(FetchError, match="own network"):
        resolve("mixed.example", 80, allow_local=False)
    assert resolve("mixed.example", 80, allow_local=True) == "93.184.216.34"


def test_verify_url() -> None:
    assert verify_url("http://93.184.216.34/x.png")
    assert not verify_url("http://127.0.0.1/x.png")
    assert not verify_url("not a url")


def test_a_client_may_name_a_picture_by_url_as_far_as_the_settings_allow(server: Server, site: str) -> None:
    refused = server.client.post("/sdapi/v1/img2img", json={"init_images": [f"{site}/a.png"]})
    assert refused.status_code == 422
    assert Site.seen == []
    server.app.options.set("api_forbid_local_requests", False)
    assert from_base64(server.img2img(init_images=[f"{site}/a.png"])["images"][0]).size == (64, 64)
    assert server.last_request.init_images[0].size == (24, 16)
    server.app.options.set("api_enable_requests", False)
    refused = server.client.post("/sdapi/v1/img2img", json={"init_images": [f"{site}/a.png"]})
    assert "disabled (setting" in refused.json()["detail"]


class Dripping(BaseHTTPRequestHandler):
    """Sends a byte now and then, forever: in its head or in its body."""

    def do_GET(self) -> None:
        start = b"HTTP/1.0 200 OK\r\nX-Long: " if self.path == "/head" else b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n"
        try:
            self.wfile.write(start)
            for _ in range(2000):
                self.wfile.write(b"x")
                self.wfile.flush()
                threading.Event().wait(0.01)
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        """Log nothing to the console."""


@pytest.mark.parametrize("path", ["/head", "/body"])
def test_a_host_that_drips_is_given_up_after_the_whole_time(path: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(FetchError, match=r"takes? too long"):
                fetch(f"http://127.0.0.1:{server.server_port}{path}", FetchRules(allow_local=True, timeout_s=0.3))
        finally:
            server.shutdown()
            thread.join()


def test_all_urls_of_a_request_share_one_time(site: str) -> None:
    token = fetching.fetch_deadline.set([])
    try:
        assert fetch(f"{site}/a.png", LOCAL) == Site.picture
        (deadline,) = fetching.fetch_deadline.get() or [0.0]
        fetching.fetch_deadline.set([deadline - LOCAL.timeout_s - 1])
        with pytest.raises(FetchError, match=r"takes? too long"):
            fetch(f"{site}/a.png", LOCAL)
    finally:
        fetching.fetch_deadline.reset(token)
