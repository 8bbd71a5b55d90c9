"""Who leaves a device when room is needed. Pure: numbers in, victims out; the store moves the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """Weights on a device: whose (a number the caller chooses), how many bytes leaving would free there, and whether a running job holds them."""

    key: int
    frees_bytes: int
    pinned: bool = False


def plan_eviction(residents_newest_first: Sequence[Resident], *, need_bytes: int, free_bytes: int, evict_all: bool = False) -> tuple[Resident, ...]:
    """Victims in the order they leave: least recently used first, until `free_bytes` plus what they free exceeds `need_bytes`.

    Pinned residents never leave. With `evict_all` everyone else does. When all of it is not enough, all leave; the caller measures again.
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
