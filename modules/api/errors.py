"""Error answers: a status and {error, detail, body, errors}. Never contains a stack trace or a picture's contents."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from modules.errors import RequestError
from modules.http_edge.bodies import BodyRefused

log = logging.getLogger(__name__)

OUT_OF_MEMORY_STATUS = 507
DISK_FULL_STATUS = 507
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC})
_DISK_FULL_TEXT = "The disk of the server is full; nothing was changed. Free some space there, then try again."
_OUT_OF_MEMORY_NAMES = ("OutOfMemory", "OutOfMemoryError", "MemoryError")
_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")
_OUT_OF_MEMORY_REMEDY = "Request a smaller picture or batch, or start the server with --lowvram."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory. Recognizes the errors of torch and of the engine by name, without imports."""
    if any(kind.__name__ in _OUT_OF_MEMORY_NAMES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)


def error_body(error: str, detail: Any, *, errors: str = "") -> dict[str, Any]:
    """The JSON of a failed request. `errors` is the detail as one string."""
    return {"error": error, "detail": detail, "body": "", "errors": errors or (detail if isinstance(detail, str) else "")}


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that raised `error`. Errors that are not the client's mistake are logged with a traceback."""
    if isinstance(error, RequestValidationError):
        entries = [_plain_entry(entry) for entry in error.errors()]
        if isinstance(error.body, bytes):  # the body was not parsed as JSON because its header does not declare it
            entries[0]["msg"] += " (send the header Content-Type: application/json)"
        return JSONResponse(error_body("RequestValidationError", entries, errors=_as_sentence(entries)), status_code=422)
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        return JSONResponse(error_body("HTTPException", error.detail), status_code=error.status_code, headers=headers)
    if isinstance(error, BodyRefused):
        return JSONResponse(error_body(type(error).__name__, error.text), status_code=error.status)
    if isinstance(error, RequestError):
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return JSONResponse(error_body(type(error).__name__, str(error)), status_code=error.status, headers=headers)
    if is_out_of_memory(error):
        log.error("Out of memory: %s", error)
        return JSONResponse(error_body("OutOfMemoryError", _out_of_memory_text(error)), status_code=OUT_OF_MEMORY_STATUS)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        log.error("The disk is full: %s", error)
        return JSONResponse(error_body(type(error).__name__, _DISK_FULL_TEXT), status_code=DISK_FULL_STATUS)
    log.error("API request failed: %s: %s", type(error).__name__, error, exc_info=error)
    detail = "The server failed to handle the request; see its log for details."
    return JSONResponse(error_body(type(error).__name__, detail, errors=f"{type(error).__name__}: {_first_line(error)}"), status_code=500)


def _plain_entry(entry: Any) -> dict[str, Any]:
    """Location, message and type; not the value, which may be a whole picture."""
    message, kind = str(entry.get("msg", "")), str(entry.get("type", ""))
    if kind == "json_invalid":
        message = f"{message}: {entry.get('ctx', {}).get('error', '')}"
    return {"loc": list(entry.get("loc", ())), "msg": message, "type": kind}


def _as_sentence(entries: Iterable[dict[str, Any]]) -> str:
    return "; ".join(f"{'.'.join(map(str, entry['loc'][1:] or entry['loc']))}: {entry['msg']}" for entry in entries)


def _out_of_memory_text(error: BaseException) -> str:
    text = str(error).strip() or "The server is out of memory."
    return text if "smaller" in text else f"{text} {_OUT_OF_MEMORY_REMEDY}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else ""
