"""A1111's methods of a request, which extensions override: a step of a job asks here whether one did, and else calls our function directly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def a1111_method(method: Method) -> Method:
    """Marks a method of a request that only calls one of our functions: it is there for extensions to call and override."""
    method.is_ours = True  # type: ignore[attr-defined]
    return method


def overridden(p: Any, name: str) -> Callable[..., Any] | None:
    """The request's method `name` where a subclass has its own or an extension replaced it on the object; None where it is ours."""
    method: Callable[..., Any] = getattr(p, name)
    return None if getattr(method, "is_ours", False) else method


def step_of(p: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What to call, with the arguments after `p`: the overriding method, or `function` on the request."""
    method = overridden(p, name)
    return partial(function, p) if method is None else method
