"""A1111's methods of a request, which extensions may override: a step of a job checks that here, and otherwise calls our function directly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def a1111_method(method: Method) -> Method:
    """Marks a request method that only calls one of our functions; it exists for extensions to call and override."""
    method.is_ours = True  # type: ignore[attr-defined]
    return method


def overridden(p: Any, name: str) -> Callable[..., Any] | None:
    """The request's method `name` if a subclass or an extension replaced it; None if it is ours."""
    method: Callable[..., Any] = getattr(p, name)
    return None if getattr(method, "is_ours", False) else method


def step_of(p: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The overriding method, or `function` bound to the request; call it with the arguments after `p`."""
    method = overridden(p, name)
    return partial(function, p) if method is None else method
