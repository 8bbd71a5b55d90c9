"""A fixture that closes the event loops that gradio leaves open whenever a page is built outside of one. A conftest imports it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def close_event_loops() -> Iterator[None]:
    made: list[asyncio.AbstractEventLoop] = []
    make = asyncio.new_event_loop

    def remember() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(asyncio, "new_event_loop", remember)
        yield
    if made:
        asyncio.set_event_loop(None)
    for loop in made:
        loop.close()
