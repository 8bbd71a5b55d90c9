"""Threads for request work before the job: a few, and none that ping, progress or the job queue depend on."""

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
    """For pictures inside the request."""
    return ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="api-decode")


@functools.cache
def fetchers() -> ThreadPoolExecutor:
    """For pictures from other hosts, which may be slow up to the timeout."""
    return ThreadPoolExecutor(NUM_FETCHERS, thread_name_prefix="api-fetch")


@functools.cache
def previews() -> ThreadPoolExecutor:
    """For previews of the running job."""
    return ThreadPoolExecutor(1, thread_name_prefix="api-preview")


async def run_in(pool: ThreadPoolExecutor, function: Callable[P, ResultT], *args: P.args, **kwargs: P.kwargs) -> ResultT:
    """Run `function` on a thread of `pool`, in the caller's context."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(pool, functools.partial(context.run, function, *args, **kwargs))


def pool_for(body: Any) -> ThreadPoolExecutor:
    """The pool for a request with this body: the fetchers' if it contains a URL."""
    return fetchers() if names_url(body) else decoders()


def names_url(value: Any) -> bool:
    """Whether any string in `value` starts like a URL. Copies nothing. Prompts match too, which only selects the other pool."""
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
