"""Passwords of HTTP basic authentication and of the page's login, compared in constant time."""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Sequence

Logins = Sequence[tuple[str, str]]


def is_known(name: str, password: str, logins: Logins) -> bool:
    """Whether `logins` contain this pair. Always compares with all of them, so that timing reveals nothing."""
    accepted = False
    for known_name, known_password in logins:
        same_name = secrets.compare_digest(_bytes(name), _bytes(known_name))
        same_password = secrets.compare_digest(_bytes(password), _bytes(known_password))
        accepted |= same_name & same_password
    return accepted


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def header_is_known(header: str | None, logins: Logins) -> bool:
    """Whether an Authorization header matches one of `logins`."""
    given = basic_credentials(header)
    name, password = given or ("", "")
    return is_known(name, password, logins) and given is not None


def basic_credentials(header: str | None) -> tuple[str, str] | None:
    """(name, password) of a Basic header; None for anything else."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        raw = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    name, colon, password = text.partition(":")
    return (name, password) if colon else None
