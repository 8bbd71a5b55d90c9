"""Dequantizes weights while a layer runs, by hooks on the layer, if they are stored differently than they are computed with.

The stored tensor itself never changes. Hooks that fetch a streamed layer run before these (they are prepended); hooks that change weights run
between these and the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from backend.storage.kinds import has_packed_weights, is_packed, storage_of
from backend.storage.native_fp8 import operand_of


def is_cast_layer(layer: nn.Module) -> bool:
    """Whether this layer's weights may be stored compactly: linear, convolution and embedding layers, also those that make a norm's scales."""
    return isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding))


def set_types(module: nn.Module, storage_dtype: torch.dtype, computation_dtype: torch.dtype, *, multiplies_fp8: bool = False) -> None:
    """Store the weights of cast layers in `storage_dtype` and all others in `computation_dtype`; layers compute in `computation_dtype`.

    A weight that already has its type keeps its memory. Packed weights, integers, and buffers that no layer casts, keep their type.
    `multiplies_fp8`: linear layers with e4m3 weights compute their product in fp8 instead of dequantizing (`native_fp8`).
    """
    if storage_dtype == computation_dtype and not has_packed_weights(module):
        nn.Module.to(module, storage_dtype)  # diffusers' own `to` warns about every change of dtype
        return
    for layer in module.modules():
        is_cast = is_cast_layer(layer)
        _cast_own_tensors(layer, storage_dtype if is_cast else computation_dtype)
        if is_cast:
            _Dequantizer(layer, computation_dtype, multiplies_fp8=multiplies_fp8)


def _cast_own_tensors(layer: nn.Module, dtype: torch.dtype) -> None:
    for parameter in layer._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in layer._buffers.items():
        if buffer is not None and buffer.is_floating_point():
            layer._buffers[name] = buffer.to(dtype)


class _Dequantizer:
    """The hooks of one layer. A deep copy of the layer gets its own hooks, because only the types outlive a forward."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, *, multiplies_fp8: bool = False) -> None:
        self._dtype, self._multiplies_fp8 = dtype, multiplies_fp8
        self._stored: dict[str, nn.Parameter] = {}
        self.handles: tuple[RemovableHandle, ...] = (
            layer.register_forward_pre_hook(self.enter),
            layer.register_forward_hook(self.leave, prepend=True, always_call=True),  # the last to enter leaves first
        )

    def enter(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if isinstance(layer, nn.Embedding) and is_packed(layer.weight) and args and not _is_changed_whole(layer):
            return self._enter_table(layer, args)
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            storage = storage_of(parameter)
            if not storage.computes_in(self._dtype):
                self._stored[name] = parameter
                operand = operand_of(storage) if self._multiplies_fp8 and isinstance(layer, nn.Linear) and not _is_changed_whole(layer) else None
                if operand is not None:
                    layer._parameters[name] = operand  # type: ignore[assignment]  # a Parameter of it would lose its scales
                    continue
                layer._parameters[name] = nn.Parameter(storage.dequantize(self._dtype), requires_grad=False)
        return None

    def _enter_table(self, layer: nn.Embedding, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Dequantize only the rows of a table that are looked up, and number them again: a language model's table is large, a prompt short."""
        rows, indices = torch.unique(args[0], return_inverse=True)
        parameter = layer._parameters["weight"]
        assert parameter is not None
        self._stored["weight"] = parameter
        value = storage_of(parameter).look_up(rows, self._dtype)
        layer._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        return (indices, *args[1:])

    def leave(self, layer: nn.Module, args: object, output: object) -> None:
        layer._parameters.update(self._stored)
        self._stored.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Dequantizer:
        copy = _Dequantizer.__new__(_Dequantizer)
        memo[id(self)] = copy
        copy._dtype, copy._multiplies_fp8, copy._stored, copy.handles = self._dtype, self._multiplies_fp8, {}, ()
        return copy


def _is_changed_whole(layer: nn.Module) -> bool:
    """Whether another hook changes the layer's weight, for which it must be there with all its rows."""
    return any(getattr(getattr(hook, "__self__", None), "needs_whole_weight", False) for hook in layer._forward_pre_hooks.values())


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside this context every layer of the module computes in `dtype`, however its weights are stored. The stored weights do not change."""
    hooks = [_Dequantizer(layer, dtype) for layer in module.modules() if layer._parameters]
    try:
        yield
    finally:
        for handle in [handle for hook in hooks for handle in hook.handles]:
            handle.remove()
