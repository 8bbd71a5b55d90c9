"""Threads for what a request costs before its job: few, and none that ping, progress or the job line wait for."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
ResultT = TypeVar("ResultT")

NUM_DECODERS = 4
NUM_FETCHERS = 8
_URL = re.compile(r"\s*https?://")


@functools.cache
def decoders() -> ThreadPoolExecutor:
    """For pictures that are in the request."""
    return ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="api-decode")


@functools.cache
def fetchers() -> ThreadPoolExecutor:
    """For pictures that other hosts send, as slowly as they like up to the time-out."""
    return ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="api-fetch")


@functools.cache
def previews() -> ThreadPoolExecutor:
    """For previews of the running job."""
    return ThreadPoolExecutor(1, thread_name_prefix="api-preview")


async def run_in(pool: ThreadPoolExecutor, function: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
    """`function` on a thread of `pool`, in the context of the caller."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(pool, functools.partial(context.run, function, *args, **kwargs))


def pool_for(body: Any) -> ThreadPoolExecutor:
    """The pool for a request with this body: that of the fetchers if it names anything by URL."""
    return fetchers() if names_url(body) else decoders()


def names_url(value: Any) -> bool:
    """Whether a text anywhere in `value` begins as a URL. Nothing is copied; prompts count too, which costs nothing but the other pool."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if _URL.match(one):
                return True
        elif isinstance(one, Mapping):
            waiting.extend(one.values())
        elif isinstance(one, (list, tuple)):
            waiting.extend(one)
        elif hasattr(type(one), "model_fields"):
            waiting.extend(one.__dict__.values())
    return False
