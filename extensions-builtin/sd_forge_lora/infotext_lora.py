"""LoRAs in pasted parameters: `<lora:name:1>` of a file that has another name here. Knows no files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

HASHES_KEY = "Lora hashes"
_MENTION = re.compile(r"<lora:([^:>]*)(?=[:>])")


def use_names_of(find_own_names: Callable[[Mapping[str, str]], Mapping[str, str]], params: MutableMapping[str, Any]) -> None:
    """Rename in the prompts what `find_own_names({name: short hash})` knows under another name: it gives {name: own name}."""
    pairs = (pair.partition(":") for pair in str(params.get(HASHES_KEY, "")).split(","))
    hashes = {name.strip(): shorthash.strip() for name, _, shorthash in pairs if name.strip()}
    names_here = find_own_names(hashes) if hashes else {}
    for key in ("Prompt", "Hires prompt"):
        if key in params and names_here:
            params[key] = _MENTION.sub(lambda mention: f"<lora:{names_here.get(mention[1], mention[1])}", params[key])
