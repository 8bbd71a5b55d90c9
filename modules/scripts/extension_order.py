"""Orders extensions, their scripts and their callbacks: as found, except where a metadata.ini says before or after.

Must not know what it orders: names in, names out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderRule:
    """`first` comes before `then`; lower-case names. A rule with an unknown name has no effect."""

    first: str
    then: str


def order_by_rules(names: Sequence[str], rules: Sequence[OrderRule]) -> list[str]:
    """`names`, each as early as the rules allow. Contradicting rules are reported, and those in the cycle ignored."""
    known = {name.lower(): name for name in names}
    waits_for: dict[str, set[str]] = {name: set() for name in names}
    for rule in rules:
        first, then = known.get(rule.first), known.get(rule.then)
        if first is not None and then is not None and first != then:
            waits_for[then].add(first)
    return _sorted(list(names), waits_for)


def _sorted(waiting: list[str], waits_for: dict[str, set[str]]) -> list[str]:
    done: list[str] = []
    while waiting:
        ready = next((name for name in waiting if not waits_for[name] - set(done)), None)
        if ready is None:
            ready = waiting[0]
            others = ", ".join(sorted(waits_for[ready] - set(done)))
            log.warning("metadata.ini: %s and %s each ask to come after the other, directly or indirectly; the first one goes first.", ready, others)
        waiting.remove(ready)
        done.append(ready)
    return done
