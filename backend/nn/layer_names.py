"""Names of layers in their networks, and which network a hook's call belongs to. Copies of a network on other slots have the same names.

Must not know what the layers do.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_places: weakref.WeakKeyDictionary[nn.Module, tuple[str, weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
_running = threading.local()


def note_names(network: nn.Module) -> None:
    """Remember the name of every layer of a network. A layer that already has a network is noted again."""
    root = weakref.ref(network)
    for name, layer in network.named_modules():
        _places[layer] = (name, root)


def name_of(layer: nn.Module) -> str | None:
    """A layer's name in its network; None for a layer of no known network."""
    place = _places.get(layer)
    return None if place is None else place[0]


@contextmanager
def running(layer: nn.Module) -> Iterator[None]:
    """In this thread, until the end of the block, the network of `layer` is the one that `running_network` returns."""
    place, before = _places.get(layer), getattr(_running, "network", None)
    _running.network = before if place is None else place[1]()
    try:
        yield
    finally:
        _running.network = before


def running_network() -> nn.Module | None:
    """The network that a hook in this thread is called for; None outside of such a call."""
    found: nn.Module | None = getattr(_running, "network", None)
    return found
