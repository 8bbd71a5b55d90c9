"""Common behavior of all routes: password, headers, log, strict JSON."""

from __future__ import annotations

import json
import logging

import pytest
from fastapi import HTTPException

from modules.api.routes import check_credentials, parse_json
from tests.modules.api.conftest import Server, ServerFactory

USERS = (("ann", "secret:with colon"), ("bob", "pässwörd"))


def test_without_flags_only_the_pages_own_routes_are_there(start_server: ServerFactory) -> None:
    with start_server(api=False) as server:
        assert server.client.get("/internal/ping").status_code == 200
        assert server.client.post("/internal/progress", json={"id_task": "x"}).status_code == 200
        assert server.client.get("/sdapi/v1/options").status_code == 404
    with start_server(api=False, nowebui=True) as server:
        assert server.client.get("/sdapi/v1/options").status_code == 200


@pytest.mark.parametrize("user", USERS)
def test_password(start_server: ServerFactory, user: tuple[str, str]) -> None:
    with start_server(api_auth=USERS) as server:
        name, password = (text.encode("utf-8") for text in user)
        assert server.client.get("/sdapi/v1/samplers", auth=(name, password)).status_code == 200
        refused = server.client.get("/sdapi/v1/samplers", auth=(name, b"wrong"))
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Basic"
        assert refused.json()["detail"] == "Incorrect username or password"
        assert server.client.post("/sdapi/v1/txt2img", json={"steps": "wrong type"}).status_code == 401
        assert server.maker.requests == []


def test_with_a_password_what_tells_about_the_machine_is_closed_and_the_page_still_works(start_server: ServerFactory) -> None:
    for flag in ("api_auth", "gradio_auth"):
        with start_server(**{flag: USERS}) as server:
            assert server.client.get("/internal/sysinfo").status_code == 401
            assert server.client.get("/internal/sysinfo", auth=USERS[0]).status_code == 200
            assert server.client.get("/internal/ping").status_code == 200


@pytest.mark.parametrize("header", [None, "", "Basic", "Basic ???", "Bearer YW5uOmE=", "Basic YW5u", "Basic " + "A" * 100_000])
def test_headers_that_are_no_credentials(header: str | None) -> None:
    with pytest.raises(HTTPException) as refused:
        check_credentials(header, USERS)
    assert refused.value.status_code == 401


def test_every_answer_says_how_long_it_took(server: Server) -> None:
    assert float(server.client.get("/sdapi/v1/samplers").headers["X-Process-Time"]) >= 0


def test_calls_are_logged_when_asked(start_server: ServerFactory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with start_server(api_log=True) as server:
        server.get("/sdapi/v1/samplers")
        assert "API 200 GET /sdapi/v1/samplers" in caplog.text
        caplog.clear()
        server.client.post("/sdapi/v1/txt2img", content=b"x", headers={"Content-Type": "application/json"})
        assert "API 422 POST /sdapi/v1/txt2img" in caplog.text


def test_strict_json_takes_all_that_json_is() -> None:
    value = {"text": "ü 漢 \U0001f600", "numbers": [1, -2.5, 1e10, 0.0], "none": None, "yes": True}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"\xef\xbb\xbf{}") == {}
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"
