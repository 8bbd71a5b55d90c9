"""What the page wants to know of a checkpoint before it is loaded: its family, by the header of its file alone.

Imports the families, and with them torch, when it is first asked.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.checkpoints.import_lock import network_imports

if TYPE_CHECKING:
    from modules.checkpoints.listing import CheckpointInfo

log = logging.getLogger(__name__)

_WITH_HEADER = (".safetensors", ".sft", ".gguf")


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFacts:
    """`name`, as the engine calls the family; `takes_distilled`: the network takes the distilled CFG scale; `multiple_px`: sides of pictures are
    multiples of it; `defaults`: the family's PageDefaults for a file of this name; `is_variant`: they are not its usual ones; `build_token_counter`:
    as the family has it."""

    name: str
    takes_distilled: bool
    multiple_px: int
    defaults: Any
    is_variant: bool = False
    build_token_counter: Callable[[], Any] | None = None


def families_are_imported() -> bool:
    """Whether asking costs no import of torch."""
    return "backend.families.registry" in sys.modules


def facts_of(info: CheckpointInfo | None) -> FamilyFacts | None:
    """None for a file without a header that says it (a pickle), one of no known family, or none."""
    if info is None or info.path.suffix.lower() not in _WITH_HEADER:
        return None
    try:
        stamp = info.path.stat()
    except OSError:
        return None
    return _read(info.path, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int, size_bytes: int) -> FamilyFacts | None:
    with network_imports:
        from backend.checkpoint_file import CheckpointError, open_tensor_file  # imports torch
        from backend.families.registry import identify
    try:
        with open_tensor_file(path) as file:
            identified = identify(file)
    except (CheckpointError, OSError) as error:
        log.debug("%s: its family is not known: %s", path.name, error)
        return None
    if identified is None:
        return None
    family, found = identified
    defaults = family.defaults.for_name(path.stem)
    return FamilyFacts(
        name=family.name,
        takes_distilled=family.guidance.distilled is not None and bool(found.config.get("guidance_embeds", True)),
        multiple_px=max(8, family.latent.multiple_px),
        defaults=defaults,
        is_variant=defaults is not family.defaults,
        build_token_counter=family.build_token_counter,
    )
