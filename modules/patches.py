"""Replaces a function of another module and restores it, so that two extensions patching the same function do not lose the original."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

originals: dict[Any, dict[tuple[Any, str], Any]] = defaultdict(dict)
"""Who patched -> (object, attribute) -> the original."""


def patch(key: Any, obj: Any, field: str, replacement: Any) -> Any:
    """Replace `obj.field` with `replacement` for `key`; returns the original. Raises RuntimeError if `key` already replaced it."""
    place = (obj, field)
    if place in originals[key]:
        raise RuntimeError(f"patch for {field} is already applied by {key}; undo it first.")
    original = getattr(obj, field)
    originals[key][place] = original
    setattr(obj, field, replacement)
    return original


def undo(key: Any, obj: Any, field: str) -> None:
    """Restore what `key` replaced. Raises RuntimeError if it replaced nothing."""
    place = (obj, field)
    if place not in originals[key]:
        raise RuntimeError(f"there is no patch for {field} by {key} to undo.")
    setattr(obj, field, originals[key].pop(place))


def original(key: Any, obj: Any, field: str) -> Any:
    """The original of `obj.field` before `key` replaced it; None if it has not."""
    return originals[key].get((obj, field))
