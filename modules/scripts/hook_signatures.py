"""Checks that an extension's function accepts the host's call. Knows neither scripts nor events."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def find_signature_faults(
    function: Callable[..., Any], *, name: str, called_as: str, num_values: int, keywords: Sequence[str] = (), any_keyword: bool = False
) -> Iterator[str]:
    """Yields, worded for its author, why `function` cannot take `num_values` positional values and `keywords`.

    `any_keyword`: the host may pass additional keywords. `num_values` includes `self` for a function of a class.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # implemented in C
        return
    kinds = {parameter.kind for parameter in parameters}
    yield from _positional_faults(parameters, num_values, f"{name}() {{}}; it is called as {called_as}.")
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        names = {parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY}
        missing = [keyword for keyword in keywords if keyword not in names]
        if missing:
            yield f"{name}() does not take {', '.join(missing)}, which the host passes; add **kwargs: {called_as}."
        elif any_keyword:
            yield f"{name}() takes no additional keywords; add **kwargs: {called_as}."
    unknown = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is p.empty and p.name not in keywords]
    if unknown:
        yield f"{name}() requires unknown {', '.join(unknown)}; available keywords: {', '.join(keywords) or 'none'}."


def _positional_faults(parameters: Sequence[inspect.Parameter], num_values: int, sentence: str) -> Iterator[str]:
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    if len(positional) < num_values:
        yield sentence.format(f"takes {len(positional)} arguments")
