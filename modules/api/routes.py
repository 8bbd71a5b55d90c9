"""What every API route does around its handler: check the password, read strict JSON, turn errors into answers, time and log the call.

It is done by the route itself and not by middleware, so that it works on a server that runs already and leaves the page's own routes alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.routing import APIRoute

from modules.api.errors import error_response

log = logging.getLogger(__name__)

PROCESS_TIME_HEADER = "X-Process-Time"
_MAX_DIGITS = 400
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutePolicy:
    """Who may call (an empty tuple: everyone) and whether calls are logged."""

    credentials: tuple[tuple[str, str], ...] = ()
    log_calls: bool = False


def create_router(policy: RoutePolicy) -> APIRouter:
    """A router whose routes follow `policy`."""

    class PolicyRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            return _guarded(super().get_route_handler(), policy)

    return APIRouter(route_class=PolicyRoute)


def _guarded(handler: Callable[[Request], Awaitable[Response]], policy: RoutePolicy) -> Handler:
    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        try:
            if policy.credentials:
                check_credentials(request.headers.get("authorization"), policy.credentials)
            response = await handler(StrictRequest(request.scope, request.receive))
        except Exception as error:  # noqa: BLE001 - wall: the API's handlers
            response = error_response(error)
        seconds = time.perf_counter() - started
        response.headers[PROCESS_TIME_HEADER] = f"{seconds:.4f}"
        if policy.log_calls:
            client = request.client.host if request.client else "?"
            log.info("API %d %s %s %s %.3f s", response.status_code, request.method, request.url.path, client, seconds)
        return response

    return handle


# Password


def check_credentials(header: str | None, credentials: Sequence[tuple[str, str]]) -> None:
    """Raises HTTPException 401 unless the Authorization header names one of `credentials`. Takes the same time for every wrong one."""
    given = _basic_credentials(header)
    name, password = given or ("", "")
    accepted = False
    for known_name, known_password in credentials:
        same_name = secrets.compare_digest(name.encode(), known_name.encode())
        same_password = secrets.compare_digest(password.encode(), known_password.encode())
        accepted |= same_name & same_password
    if given is None or not accepted:
        raise HTTPException(401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"})


def _basic_credentials(header: str | None) -> tuple[str, str] | None:
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


# Strict JSON


class StrictRequest(Request):
    """A request whose JSON holds only what JSON defines: no NaN or Infinity, no halves of surrogate pairs."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


def parse_json(body: bytes) -> Any:
    """The value of a JSON body. Raises JSONDecodeError, also for numbers that are not finite and for text that is not Unicode."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("the body is not UTF-8", "", error.start) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_short_int)
    except RecursionError:
        raise json.JSONDecodeError("the body is nested too deeply", "", 0) from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise json.JSONDecodeError("a text holds half of a surrogate pair", "", 0) from None
    return value


def _refuse_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is not a JSON number", "", 0)


def _short_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise json.JSONDecodeError(f"a number of {len(text)} digits", "", 0)
    return int(text)


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise json.JSONDecodeError(f"{text[:40]} is too large for a number", "", 0)
    return number
