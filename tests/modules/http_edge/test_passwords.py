"""Passwords: who is known, in a time that says nothing about them."""

from __future__ import annotations

import ast
import base64
import hmac
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from modules.http_edge import passwords
from modules.http_edge.server import create_fastapi_app
from modules.launch.cmd_args import parse_config
from tests.contract.sources import ROOT_DIR

LOGINS = (("ann", "first"), ("bob", "second"), ("ann", "third"))


def header(text: str | bytes) -> str:
    return "Basic " + base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()


@pytest.mark.parametrize(
    ("given", "is_known"),
    [
        *((header(text), True) for text in ("ann:first", "bob:second", "ann:third")),
        *((header(text), False) for text in ("ann:second", "bob:first", "ann:", ":first", ":", "ann", "ann:first ", "Ann:first", "")),
        *((text, False) for text in (None, "", "Basic", "Basic ", "Basic !!!", "Bearer " + base64.b64encode(b"ann:first").decode())),
        (header(b"ann:\xff"), False),
    ],
)
def test_a_header_is_known_only_with_a_login_of_the_list(given: str | None, is_known: bool) -> None:
    assert passwords.header_is_known(given, LOGINS) is is_known
    assert passwords.header_is_known(given, ()) is False


@pytest.mark.parametrize("given", ["ann:first", "ann:wrong", "nobody:first", "bob:second", "x" * 5000, ""])
def test_every_secret_is_compared_whole_whatever_was_given(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of comparisons says neither whether a name exists nor which login fitted; each takes the same time for any difference."""
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(passwords.secrets, "compare_digest", compare)
    passwords.header_is_known(header(given), LOGINS)
    assert compared == [part.encode() for login in LOGINS for part in login]


def test_no_other_code_compares_passwords() -> None:
    """`==` and `in` end at the first difference."""
    found = []
    for path in [ROOT_DIR / "webui.py", *(ROOT_DIR / "modules").rglob("*.py"), *(ROOT_DIR / "extensions-builtin").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in node.ops):
                words = {name for part in ast.walk(node) for name in (getattr(part, "id", ""), getattr(part, "attr", ""))}
                found += [f"{path.name}:{node.lineno}" for word in words if "password" in word or word in ("api_auth", "gradio_auth", "secret")]
    assert found == []


def test_a_file_of_logins_guards_the_api(tmp_path: Path) -> None:
    (tmp_path / "logins").write_text("ann:first\nbob:second\n")
    config = parse_config(["--data-dir", str(tmp_path), "--api", "--api-auth-file", str(tmp_path / "logins")], {})
    app = create_fastapi_app(config)
    app.add_api_route("/sdapi/v1/echo", lambda: 7)
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        assert [client.get("/sdapi/v1/echo", auth=login).status_code for login in (("bob", "second"), ("bob", "first"))] == [200, 401]
        assert client.get("/sdapi/v1/echo").status_code == 401
