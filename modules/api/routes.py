"""Common work of every API route: check the password, parse strict JSON, turn errors into answers, time and log the call.

Behind `modules.http_edge` the password has already been checked; a route on another app checks it itself.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.routing import APIRoute

from modules.api.errors import error_response
from modules.api.fetching import fetch_deadline
from modules.api.limits import MAX_JSON_DEPTH, json_depth
from modules.api.picture_budget import allowance
from modules.api.pools import decoders, run_in
from modules.api.waiting import current_request
from modules.http_edge.edge import ADMITTED
from modules.http_edge.passwords import header_is_known

log = logging.getLogger(__name__)

PROCESS_TIME_HEADER = "X-Process-Time"
_MAX_DIGITS = 400
LARGE_BODY_BYTES = 1 << 20
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutePolicy:
    """Who may call (an empty tuple means everyone), and whether calls are logged."""

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
            if policy.credentials and not request.scope.get(ADMITTED):
                check_credentials(request.headers.get("authorization"), policy.credentials)
            strict = StrictRequest(request.scope, request.receive)
            current_request.set(strict)
            fetch_deadline.set([])
            with allowance():
                response = await handler(strict)
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
    """Raises HTTPException 401 unless the Authorization header matches one of `credentials`."""
    if not header_is_known(header, credentials):
        raise HTTPException(401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"})


# Strict JSON


class StrictRequest(Request):
    """A request whose JSON must be strictly valid: no NaN or Infinity, no lone surrogates."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            self._json = parse_json(body) if len(body) < LARGE_BODY_BYTES else await run_in(decoders(), parse_json, body)
        return self._json


def parse_json(body: bytes) -> Any:
    """The value of a JSON body. Raises JSONDecodeError, also for non-finite numbers and text that is not Unicode."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("the body is not UTF-8", "", error.start) from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_short_int)
    except RecursionError:
        raise json.JSONDecodeError("the body is nested too deeply", "", 0) from None
    if json_depth(value) > MAX_JSON_DEPTH:
        raise json.JSONDecodeError(f"the body is nested more than {MAX_JSON_DEPTH} deep", "", 0)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise json.JSONDecodeError("a string contains half of a surrogate pair", "", 0) from None
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
