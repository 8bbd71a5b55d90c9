"""Which models to evict from a device when room is needed. Pure: numbers in, victims out; the store moves the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Weights on a device: `key` (the caller's number for the model), the bytes that evicting it frees, and whether a running job uses it."""

    key: int
    frees_bytes: int
    pinned: bool = False


def plan_eviction(residents_newest_first: Sequence[Resident], *, need_bytes: int, free_bytes: int, evict_all: bool = False) -> tuple[Resident, ...]:
    """Victims in eviction order: least recently used first, until `free_bytes` plus what they free exceeds `need_bytes`.

    Pinned residents are never evicted. With `evict_all` all others are. If that is not enough, the caller finds out by measuring again.
    """
    victims: list[Resident] = []
    for resident in reversed(residents_newest_first):
        if not evict_all and free_bytes > need_bytes:
            break
        if resident.pinned or resident.frees_bytes <= 0:
            continue
        victims.append(resident)
        free_bytes += resident.frees_bytes
    return tuple(victims)
