"""Routes of the page whose refusals are answers that its scripts can show."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse

from modules.errors import RequestError

log = logging.getLogger(__name__)


def saying_errors(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler`; its RequestError and OSError become status 400 with `{"detail": message}`."""

    @functools.wraps(handler)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except RequestError as error:
            return JSONResponse({"detail": str(error)}, status_code=400)
        except OSError as error:
            log.warning("%s: %s", handler.__name__, error)
            return JSONResponse({"detail": f"The file system refused it: {error.strerror or error}"}, status_code=400)

    return answer
