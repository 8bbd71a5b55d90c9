"""What Civitai writes of Flux pictures, as this program means it. Its list of samplers does not know Flux's, and its CFG scale is the distilled one.

Pure: a parsed infotext, changed in place. Must not know pages, files or settings.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

UNKNOWN_SAMPLER = "Undefined"
FLUX_SAMPLER, FLUX_SCHEDULE = "Euler", "Simple"
_RESOURCES, _METADATA = "Civitai resources", "Civitai metadata"


def is_civitai_flux(params: MutableMapping[str, Any]) -> bool:
    """Whether Civitai wrote the text and names a Flux model in it."""
    written = " ".join(f"{key} {value}" for key, value in params.items() if key.startswith("Civitai"))
    return bool(written) and ("FLUX" in written or _names_flux(params.get(_RESOURCES)))


def _names_flux(resources: Any) -> bool:
    """Whether the list of what was used has a checkpoint called Flux, however it is spelled."""
    try:
        entries = json.loads(str(resources))
    except (ValueError, RecursionError):
        return False
    checkpoints = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return any(str(entry.get("type")).lower() == "checkpoint" and "flux" in str(entry.get("modelName")).lower() for entry in checkpoints)


def reread_flux(params: MutableMapping[str, Any]) -> None:
    """Sampler and scales as Flux takes them: CFG 1, the number written next to it as distilled CFG. Clip skip means nothing to Flux."""
    params.pop("Clip skip", None)
    if params.get("Sampler") in (None, UNKNOWN_SAMPLER):
        params["Sampler"] = FLUX_SAMPLER
        params.setdefault("Schedule type", FLUX_SCHEDULE)
    if "CFG scale" in params and "Distilled CFG Scale" not in params:
        params["Distilled CFG Scale"], params["CFG scale"] = params["CFG scale"], "1"
