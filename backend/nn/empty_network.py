"""Makes a network like another, with the same names and types but no weights: the start of a copy on another slot. Knows no families and no slots."""

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
    """A network of the same kind on the meta device, in the same mode, without gradients and without hooks.

    A diffusers network is built again from its configuration, with the library's default dtypes, which the caller then sets. Any other network is
    copied without its numbers.
    """
    if isinstance(network, ConfigMixin):
        with META:
            made: Any = type(network).from_config(without_original_names(network.config))
        return made.requires_grad_(False).train(network.training)  # type: ignore[no-any-return]
    return copy_without_weights(network)


def copy_without_weights(network: Network) -> Network:
    """A deep copy whose tensors have the same shape and dtype, on the meta device, without gradients."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_like(tensor, device=META)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy_without_owner(network, memo)
