"""Limits of request bodies: size, speed, and bytes of all bodies in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

MAX_BODY_BYTES = 256 << 20
MAX_UPLOAD_BYTES = 2 << 30
MAX_HELD_BYTES = 1 << 30
"""Limit for all bodies in memory at one time."""
BODY_GRACE_S = 60.0
SLOWEST_BYTES_PER_S = 64 << 10


class BodyRefused(Exception):
    """The body is too large or too slow. `status` is the client's answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(kw_only=True)
class HeldBytes:
    """Number of body bytes in memory. Belongs to the server's event loop."""

    limit: int = MAX_HELD_BYTES
    held: int = 0


class BoundedBody:
    """`receive` of one request, with a maximum size and a minimum speed."""

    def __init__(self, receive: Receive, *, max_bytes: int, held: HeldBytes | None, grace_s: float = BODY_GRACE_S) -> None:
        self._receive, self._max_bytes, self._held, self._grace_s = receive, max_bytes, held, grace_s
        self._received = 0
        self._is_whole = False
        self._started: float | None = None
        self.refusal: BodyRefused | None = None

    async def __call__(self) -> Message:
        """The next message. Raises BodyRefused, and again on every later call."""
        if self.refusal is not None:
            raise self.refusal
        if self._is_whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._seconds_left())
        except asyncio.TimeoutError:  # the same class as the builtin since Python 3.11
            raise self._refuse(408, f"the body arrived too slowly ({self._received} bytes in time). Send it faster or in smaller requests.") from None
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            self._is_whole = not message.get("more_body", False)
        else:
            self._is_whole = True
        return message

    def _seconds_left(self) -> float:
        now = asyncio.get_running_loop().time()
        self._started = now if self._started is None else self._started
        return max(self._started + self._grace_s + self._received / SLOWEST_BYTES_PER_S - now, 0.0)

    def _count(self, num_bytes: int) -> None:
        self._received += num_bytes
        if self._received > self._max_bytes:
            raise self._refuse(413, too_large(self._max_bytes))
        if self._held is not None:
            self._held.held += num_bytes
            if self._held.held > self._held.limit:
                raise self._refuse(503, f"requests being read hold more than {self._held.limit >> 20} MiB in total. Try again later.")

    def _refuse(self, status: int, text: str) -> BodyRefused:
        self.refusal = BodyRefused(status, text)
        return self.refusal

    def close(self) -> None:
        """The request has ended: release its bytes."""
        if self._held is not None:
            self._held.held -= self._received
            self._received = 0


def too_large(max_bytes: int) -> str:
    return f"the body is too large; the limit is {max_bytes >> 20} MiB. Send smaller or fewer pictures."
