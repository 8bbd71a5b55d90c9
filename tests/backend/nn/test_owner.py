"""Objects that belong to a network besides its weights, when it is copied and when it is deleted."""

from __future__ import annotations

import copy
import gc
import weakref

from torch import nn

from backend.nn.empty_network import copy_without_weights
from backend.nn.owner import owner_of


class Session:
    """Stays with its original network."""


class Changes:
    """Is passed on to a copy."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names

    def copied_for(self, network: nn.Module) -> Changes:
        return Changes(self.names)


def _network() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    owner_of(network).put(Session())
    owner_of(network).put(Changes(("0.weight",)))
    return network


def test_a_network_has_one_owner_with_one_part_per_class() -> None:
    network = _network()
    session = owner_of(network).find(Session)
    assert owner_of(network) is owner_of(network)
    assert session is not None
    assert owner_of(network).part(Session) is session
    assert owner_of(network).take(Session) is session
    assert owner_of(network).find(Session) is None


def test_serials_are_never_given_again() -> None:
    seen = set()
    for _ in range(50):
        seen.add(owner_of(nn.Linear(1, 1)).serial)
        gc.collect()
    assert len(seen) == 50


def test_copies_get_parts_that_allow_it_and_share_no_owner() -> None:
    network = _network()
    for other in (copy.deepcopy(network), copy.copy(network)):
        assert owner_of(other) is not owner_of(network)
        assert owner_of(other).serial != owner_of(network).serial
        assert owner_of(other).find(Session) is None
        changes = owner_of(other).find(Changes)
        assert changes is not None
        assert changes is not owner_of(network).find(Changes)
        assert changes.names == ("0.weight",)
    assert owner_of(network).find(Session) is not None


def test_a_copy_without_weights_begins_with_nothing() -> None:
    network = _network()
    owner_of(network[0]).put(Changes())  # type: ignore[index]
    empty = copy_without_weights(network)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert owner_of(empty).find(Changes) is None
    assert owner_of(empty[0]).find(Changes) is None  # type: ignore[index]


def test_a_network_is_deleted_with_its_owner() -> None:
    network = _network()
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None
