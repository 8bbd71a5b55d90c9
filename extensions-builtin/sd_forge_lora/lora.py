"""The oldest names of this extension's parts, which many extensions still try first."""

from __future__ import annotations

from typing import Any

import networks
from networks import list_available_networks, loaded_networks

list_available_loras = list_available_networks
loaded_loras = loaded_networks
_OLD_NAMES = {
    "available_loras": "available_networks",
    "available_lora_aliases": "available_network_aliases",
    "available_lora_hash_lookup": "available_network_hash_lookup",
    "forbidden_lora_aliases": "forbidden_network_aliases",
    "load_loras": "load_networks",
}


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        return getattr(networks, _OLD_NAMES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
