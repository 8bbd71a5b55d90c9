"""What belongs to a network besides its weights: one owner per network, which keeps the objects that higher layers attach to it.

The owner is the only attribute set on a module. Parts are keyed by class, so that this file need not know them: patched weights (`LoraLoader`),
swapped attributes, replica modules, the current session.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from itertools import count
from typing import Any, TypeVar

from torch import nn

Part = TypeVar("Part")
Network = TypeVar("Network", bound=nn.Module)

_ATTRIBUTE = "_owner"
_serials = count(1)


class NetworkOwner:
    """Keeps the parts of one network. `serial` identifies the network for good: unlike an `id`, it is never reused.

    A deep copy of the network gets its own owner. Parts with a `copied_for` method decide what the copy starts with; others are not copied.
    """

    def __init__(self, network: nn.Module) -> None:
        self.serial = next(_serials)
        self._network = weakref.ref(network)
        self._parts: dict[type[Any], Any] = {}

    def is_of(self, network: nn.Module) -> bool:
        return self._network() is network

    def find(self, kind: type[Part]) -> Part | None:
        """The part of that class, if there is one."""
        found: Part | None = self._parts.get(kind)
        return found

    def part(self, kind: type[Part], make: Callable[[], Part] | None = None) -> Part:
        """The part of that class, made at the first request."""
        if kind not in self._parts:
            self._parts[kind] = (make or kind)()
        found: Part = self._parts[kind]
        return found

    def put(self, part: object) -> None:
        """Keep a part, replacing an earlier one of its class."""
        self._parts[type(part)] = part

    def take(self, kind: type[Part]) -> Part | None:
        """Remove and return the part of that class."""
        found: Part | None = self._parts.pop(kind, None)
        return found

    def copied_for(self, network: nn.Module) -> NetworkOwner:
        """The owner for a copy of the network."""
        owner = NetworkOwner(network)
        for kind, part in self._parts.items():
            if hasattr(part, "copied_for"):
                owner._parts[kind] = part.copied_for(network)
        return owner

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkOwner | None:
        network = self._network()
        copy = None if network is None else memo.get(id(network))
        found = memo[id(self)] = None if copy is None else self.copied_for(copy)
        return found


def owner_of(network: nn.Module) -> NetworkOwner:
    """The network's owner, made at the first request. A shallow copy of a network gets its own owner."""
    owner: NetworkOwner | None = network.__dict__.get(_ATTRIBUTE)
    if owner is None:
        owner = network.__dict__[_ATTRIBUTE] = NetworkOwner(network)
    elif not owner.is_of(network):
        owner = network.__dict__[_ATTRIBUTE] = owner.copied_for(network)
    return owner


def copy_without_owner(network: Network, memo: dict[int, Any]) -> Network:
    """A deep copy without any parts of the network's owner. `memo` is as in `copy.deepcopy`."""
    for module in network.modules():
        if _ATTRIBUTE in module.__dict__:
            memo[id(module.__dict__[_ATTRIBUTE])] = None
    return deepcopy(network, memo)
