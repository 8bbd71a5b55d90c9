"""What belongs to a network beside its weights: one owner per network, which holds what the layers above keep with it.

The owner is the only thing that hangs on a module. Parts are kept by their class, so that this file knows none of them: changed weights
(`LoraLoader`), swapped attributes, replica modules, the session in force.
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
    """Holds the parts of one network. `serial` names the network for good: unlike an `id`, it is never given again.

    A deep copy of the network gets an owner of its own with copies of those parts that say what a copy of a network begins with
    (`copied_for`); the others stay behind.
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
        """The part of that class, made when first asked for."""
        if kind not in self._parts:
            self._parts[kind] = (make or kind)()
        found: Part = self._parts[kind]
        return found

    def put(self, part: object) -> None:
        """Keep a part, in place of an earlier one of its class."""
        self._parts[type(part)] = part

    def take(self, kind: type[Part]) -> Part | None:
        """The part of that class, which is kept no more."""
        found: Part | None = self._parts.pop(kind, None)
        return found

    def copied_for(self, network: nn.Module) -> NetworkOwner:
        """The owner that a copy of the network begins with."""
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
    """The network's owner; made when first asked for. A shallow copy of a network gets one of its own."""
    owner: NetworkOwner | None = network.__dict__.get(_ATTRIBUTE)
    if owner is None:
        owner = network.__dict__[_ATTRIBUTE] = NetworkOwner(network)
    elif not owner.is_of(network):
        owner = network.__dict__[_ATTRIBUTE] = owner.copied_for(network)
    return owner


def copy_without_owner(network: Network, memo: dict[int, Any]) -> Network:
    """A deep copy that begins with nothing of what belongs to the network. `memo` as `copy.deepcopy` takes it."""
    for module in network.modules():
        if _ATTRIBUTE in module.__dict__:
            memo[id(module.__dict__[_ATTRIBUTE])] = None
    return deepcopy(network, memo)
