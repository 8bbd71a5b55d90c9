"""Makes a network like another, with the same names and types but no weights: the start of a copy on another slot. Knows no families and no slots."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import ConfigMixin
from torch import nn

from backend.nn.owner import copy_without_owner
from backend.original_config import without_original_names
from backend.storage.packed import PackedTensor, empty_packed

META = torch.device("meta")
Network = TypeVar("Network", bound=nn.Module)


def make_empty_network(network: Network, *, keeps_packed: bool = True) -> Network:
    """A network of the same kind on the meta device, in the same mode, without gradients and without hooks.

    A diffusers network is built again from its configuration, with the library's default dtypes, which the caller then sets. Any other network is
    copied without its numbers. Packed weights keep their formats; without `keeps_packed` they become plain.
    """
    if isinstance(network, ConfigMixin):
        with META:
            made: Any = type(network).from_config(without_original_names(network.config))
        if keeps_packed:
            _pack_like(made, network)
        return made.requires_grad_(False).train(network.training)  # type: ignore[no-any-return]
    return copy_without_weights(network, keeps_packed=keeps_packed)


def _pack_like(made: nn.Module, network: nn.Module) -> None:
    """Give the new network's weights the formats of those that the other has packed."""
    for name, parameter in network.named_parameters():
        if isinstance(parameter, PackedTensor):
            owner_name, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(owner_name), leaf, nn.Parameter(empty_packed(parameter.format, META), requires_grad=False))


def copy_without_weights(network: Network, *, keeps_packed: bool = True) -> Network:
    """A deep copy whose tensors have the same shape and dtype (or format), on the meta device, without gradients."""
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        keeps_kind = keeps_packed or not isinstance(tensor, PackedTensor)
        empty = torch.empty_like(tensor, device=META) if keeps_kind else torch.empty(tensor.shape, device=META)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy_without_owner(network, memo)
