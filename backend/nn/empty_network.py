"""A network like another with the same names and types and no weights: what a copy on another slot begins as. Knows no families and no slots."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import ConfigMixin
from torch import nn

from backend.nn.owner import copy_without_owner
from backend.original_config import without_original_names

META = torch.device("meta")
Network = TypeVar("Network", bound=nn.Module)


def make_empty_network(network: Network) -> Network:
    """On the meta device, in the same mode, without gradients and without hooks.

    A network of the library is made again from its configuration, and has that type's weights until whoever wraps it sets them. Any other is
    copied without its numbers.
    """
    if isinstance(network, ConfigMixin):
        with META:
            made: Any = type(network).from_config(without_original_names(network.config))
        return made.requires_grad_(False).train(network.training)  # type: ignore[no-any-return]
    return copy_without_weights(network)


def copy_without_weights(network: Network) -> Network:
    """A deep copy whose tensors are of the same shape and type, on the meta device, without gradients."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device=META)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy_without_owner(network, memo)
