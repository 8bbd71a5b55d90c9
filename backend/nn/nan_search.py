"""Finds the layer in which a network's numbers end: the first whose output is not finite. Knows no family and no device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle


class LayerNansError(RuntimeError):
    """A network gave numbers that are not finite; the message names the layer and says what to do."""


def find_nan_layer(network: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the first layer that gives NaN or infinity while `run()` runs the network; None where none does. Parts may run on many threads."""
    found: list[str] = []
    lock = threading.Lock()

    def watch(name: str) -> RemovableHandle:
        def look(layer: nn.Module, args: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                with lock:
                    found.append(name)

        return network.get_submodule(name).register_forward_hook(look)

    handles = [watch(name) for name, layer in network.named_modules() if name and not any(layer.children())]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def check_finite(network: nn.Module, output: Tensor, run: Callable[[], object]) -> None:
    """Raises: LayerNansError where the output has a number that is not finite; `run()` makes it again for the search."""
    if _is_finite(output):
        return
    name = find_nan_layer(network, run)
    where = f"its layer {name} is the first to give such numbers" if name else "no single layer gave them when the step was done again"
    raise LayerNansError(
        f"The network gave NaN or infinity: {where}. Its numbers outgrow the type that it computes in, or the file or a LoRA is broken: start with "
        "--all-in-fp32, take LoRAs out of the prompt, or choose another file. --disable-nan-check lets such pictures through."
    )


def _is_finite(output: Any) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
