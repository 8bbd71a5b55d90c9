from __future__ import annotations

import pytest

from modules.http_edge.hosts import OwnNames, OwnSites, split_host

EVIL = "http://evil.example"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:7860", "localhost:1", "LOCALHOST", "[::1]:7860", "localhost.:7860"])
def test_loopback_answers_to_its_own_names(host: str) -> None:
    assert OwnNames("127.0.0.1").answers_to(host)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.nip.io", "a@localhost", "localhost/x", "", "[::1", "192.168.1.5"],
)
def test_loopback_answers_to_no_other_name(host: str) -> None:
    assert not OwnNames("127.0.0.1").answers_to(host)


def test_a_server_of_the_network_answers_to_addresses_and_to_names_that_nobody_can_buy() -> None:
    names = OwnNames("0.0.0.0")
    assert all(names.answers_to(host) for host in ("192.168.1.5:7860", "[fe80::1]", "gpubox", "webui:7860", "gpubox.local", "localhost"))
    assert not names.answers_to("evil.example")
    assert OwnNames("gpu.example.org").answers_to("gpu.example.org:7860")


def test_flags_add_names() -> None:
    names = OwnNames("127.0.0.1", ["sd.example.org", "*.lab.example"])
    assert names.answers_to("sd.example.org:443") and names.answers_to("a.lab.example")
    assert not names.answers_to("example.org") and not names.answers_to("lab.example.evil")
    assert OwnNames("127.0.0.1", ["*"]).answers_to("anything.example")


def test_split_host() -> None:
    assert split_host("[::1]:7860") == ("::1", 7860)
    assert split_host("a.example.") == ("a.example", None)
    assert split_host("host:port") is None


def foreign(method: str = "POST", *, is_page: bool = False, cors: tuple[str, ...] = (), regex: str | None = None, **headers: str) -> bool:
    given = {"host": "localhost:7860", **{name.replace("_", "-"): value for name, value in headers.items()}}
    names = OwnNames("127.0.0.1", ["sd.example.org"])
    return OwnSites(names, cors, regex).is_foreign(method, given, is_page=is_page)


@pytest.mark.parametrize("origin", [EVIL, "null", "http://localhost:3000", "http://localhost", "https://localhost.evil.example:7860", "x", ""])
@pytest.mark.parametrize("method", ["POST", "DELETE", "GET", "OPTIONS"])
def test_other_origins_are_foreign(method: str, origin: str) -> None:
    assert foreign(method, origin=origin)


def test_own_origins_are_not_foreign() -> None:
    assert not foreign(origin="http://localhost:7860")
    assert not foreign(origin="https://sd.example.org")  # allowed by --allowed-hosts
    assert not foreign(host="shown.example", origin="https://shown.example")
    assert not foreign(host="127.0.0.1:7860", origin="https://shown.example", x_forwarded_host="shown.example")
    assert not foreign(host="127.0.0.1:7860", origin="https://shown.example", sec_fetch_site="same-origin")


def test_the_flags_let_origins_in() -> None:
    assert not foreign(origin=EVIL, cors=(EVIL,))
    assert not foreign(origin=EVIL, cors=("*",))
    assert not foreign(origin=EVIL, regex=r"http://.*\.example")
    assert foreign(origin=f"{EVIL}.org", regex=r"http://.*\.example")


def test_requests_without_origin() -> None:
    assert not foreign()  # a program, not a browser
    assert foreign(referer=f"{EVIL}/page")
    assert not foreign(referer="http://localhost:7860/")
    assert foreign("GET", sec_fetch_site="cross-site", sec_fetch_mode="no-cors")
    assert foreign("GET", sec_fetch_site="same-site", sec_fetch_mode="no-cors")  # a page on another port of this machine
    assert not foreign("GET", is_page=True, sec_fetch_site="cross-site", sec_fetch_mode="navigate")  # someone followed a link to the page
    assert foreign("GET", sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert foreign("POST", is_page=True, sec_fetch_site="cross-site", sec_fetch_mode="navigate")
    assert not foreign("GET", sec_fetch_site="none", sec_fetch_mode="navigate")
