"""Suggests what a misspelled name may have meant, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_COMPARED_LETTERS = 200
_MAX_SHOWN = 20
_ENDINGS = ("safetensors", "ckpt", "pt", "pth", "bin", "sft", "patch")


def say_nearest(asked: object, known: Iterable[str]) -> str:
    """ "nearest are 'a', 'b' (of 7)", or the first names if none is near. Ignores case and folders."""
    names = list(dict.fromkeys(known))
    bare = {_bare(name): name for name in reversed(names)}
    near = difflib.get_close_matches(_bare(str(asked)[:_COMPARED_LETTERS]), list(bare), n=3, cutoff=0.5)
    if near:
        return f"nearest are {', '.join(repr(bare[one]) for one in near)} (of {len(names)})"
    shown = ", ".join(names[:_MAX_SHOWN]) + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")
    return f"there are: {shown}" if names else "there are none"


def _bare(name: str) -> str:
    alone = name.replace("\\", "/").rpartition("/")[2].partition(" [")[0].lower()[:_COMPARED_LETTERS]
    stem, dot, ending = alone.rpartition(".")
    return stem if dot and ending in _ENDINGS else alone
