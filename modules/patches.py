"""Replacing a function of another module and putting it back, so that two extensions which do the same do not lose the original."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

originals: dict[Any, dict[tuple[Any, str], Any]] = defaultdict(dict)
"""Who patched -> (object, attribute) -> what was there."""


def patch(key: Any, obj: Any, field: str, replacement: Any) -> Any:
    """Put `replacement` in the place of `obj.field` for `key`; what was there. Raises RuntimeError when `key` has done so already."""
    place = (obj, field)
    if place in originals[key]:
        raise RuntimeError(f"patch for {field} is already applied by {key}; undo it first.")
    original = getattr(obj, field)
    originals[key][place] = original
    setattr(obj, field, replacement)
    return original


def undo(key: Any, obj: Any, field: str) -> None:
    """Put back what `key` found there. Raises RuntimeError when it has replaced nothing."""
    place = (obj, field)
    if place not in originals[key]:
        raise RuntimeError(f"there is no patch for {field} by {key} to undo.")
    setattr(obj, field, originals[key].pop(place))


def original(key: Any, obj: Any, field: str) -> Any:
    """What `key` found at `obj.field`, None when it has not replaced it."""
    return originals[key].get((obj, field))
