"""Layers that compute on the device and in the type of what they get, under Forge's names, for networks that extensions build.

`ForgeOperations.Linear(...)` is such a layer; `with using_forge_operations():` makes layers of torch that are put into a module inside of it such
layers. Networks of this program do not use them: memory management streams their weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook


def get_weight_and_bias(layer: nn.Module, weight_args: Any = None, bias_args: Any = None, weight_fn: Any = None, bias_fn: Any = None) -> Any:
    """(weight, bias) of a layer, each first moved by `.to(**args)` and then passed through `fn`, as far as there are any."""
    prepared = []
    for name, arguments, function in (("weight", weight_args, weight_fn), ("bias", bias_args, bias_fn)):
        tensor = getattr(layer, name, None)
        if tensor is not None and arguments is not None:
            tensor = tensor.to(**arguments)
        prepared.append(tensor if tensor is None or function is None else function(tensor))
    return tuple(prepared)


def weights_manual_cast(
    layer: nn.Module, x: Tensor, skip_weight_dtype: bool = False, skip_bias_dtype: bool = False, weight_fn: Any = None, bias_fn: Any = None
) -> tuple[Tensor | None, Tensor | None, None]:
    """(weight, bias, None) on the device of `x`, and in its dtype unless skipped. The third is Forge's signal of a copy; copies here are done."""
    place = {"device": x.device}
    weight, bias = get_weight_and_bias(
        layer,
        place if skip_weight_dtype else {**place, "dtype": x.dtype},
        place if skip_bias_dtype else {**place, "dtype": x.dtype},
        weight_fn,
        bias_fn,
    )
    return weight, bias, None


@contextmanager
def main_stream_worker(weight: Tensor | None, bias: Tensor | None, signal: Any) -> Iterator[None]:
    """Around the use of what `weights_manual_cast` returned."""
    yield


def cleanup_cache() -> None:
    """Kept for extensions that call it: nothing is kept between layers."""


class CastLayer(nn.Module):
    """A layer of torch whose weights stay where and as they are stored; with `parameters_manual_cast` each call uses a cast copy."""

    parameters_manual_cast = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.parameters_manual_cast:
            return super().forward(x, *args, **kwargs)
        is_embedding = isinstance(self, nn.Embedding)  # takes numbers of tokens, and keeps its own type
        stored = {name: parameter for name, parameter in self._parameters.items() if parameter is not None}
        moved = {name: parameter.to(x.device if is_embedding else x) for name, parameter in stored.items()}
        return torch.func.functional_call(_without_cast(self), moved, (x, *args), kwargs)


def _without_cast(layer: nn.Module) -> nn.Module:
    """The same layer as torch's own, for one call."""
    plain = cast("nn.Module", object.__new__(_PLAIN_OF[type(layer)]))
    plain.__dict__.update(layer.__dict__)
    plain._parameters, plain._buffers = dict(layer._parameters), dict(layer._buffers)
    return plain


def _cast_layer(plain: type[nn.Module]) -> Any:
    """The cast layer of a layer of torch."""
    about = {"__module__": __name__, "__qualname__": f"ForgeOperations.{plain.__name__}", "__doc__": f"torch's {plain.__name__} as a CastLayer."}
    return type(plain.__name__, (CastLayer, plain), about)


class ForgeOperations:
    """Layers by torch's names. Each has `parameters_manual_cast`."""

    Linear = _cast_layer(nn.Linear)
    Conv1d = _cast_layer(nn.Conv1d)
    Conv2d = _cast_layer(nn.Conv2d)
    Conv3d = _cast_layer(nn.Conv3d)
    ConvTranspose1d = _cast_layer(nn.ConvTranspose1d)
    ConvTranspose2d = _cast_layer(nn.ConvTranspose2d)
    ConvTranspose3d = _cast_layer(nn.ConvTranspose3d)
    GroupNorm = _cast_layer(nn.GroupNorm)
    LayerNorm = _cast_layer(nn.LayerNorm)
    Embedding = _cast_layer(nn.Embedding)


_CAST_OF: dict[type, type] = {
    kind.__mro__[2]: kind for kind in vars(ForgeOperations).values() if isinstance(kind, type) and issubclass(kind, CastLayer)
}  # fmt: skip
"""Layer of torch -> the cast layer."""
_PLAIN_OF = {cast: plain for plain, cast in _CAST_OF.items()}


@contextmanager
def using_forge_operations(
    operations: Any = None, device: Any = None, dtype: torch.dtype | None = None, manual_cast_enabled: bool = False, bnb_dtype: Any = None
) -> Iterator[None]:
    """Layers of torch that this thread puts into modules become cast layers, on `device` and in `dtype` if given.

    `operations` and `bnb_dtype` chose between kinds of stored weights in Forge; here files with such weights are read by the loader.
    Raises: ValueError for 4-bit or GGUF weights.
    """
    if bnb_dtype is not None:
        raise ValueError(f"Layers of {bnb_dtype!r} cannot be built empty. Load the file as a checkpoint; its weights then stay as they are stored.")
    thread = threading.get_ident()

    def convert(module: nn.Module, name: str, layer: nn.Module | None) -> None:
        if threading.get_ident() != thread or layer is None or type(layer) not in _CAST_OF:
            return
        layer.__class__ = _CAST_OF[type(layer)]
        layer.parameters_manual_cast = manual_cast_enabled  # type: ignore[assignment]
        nn.Module.to(layer, device=device, dtype=dtype)

    handle = register_module_module_registration_hook(convert)
    try:
        yield
    finally:
        handle.remove()


def shift_manual_cast(model: nn.Module, enabled: bool) -> None:
    """Let the cast layers of `model` cast, or no longer."""
    for layer in model.modules():
        if isinstance(layer, CastLayer):
            layer.parameters_manual_cast = enabled


class DynamicSwapInstaller:
    """Lets a module use its parameters on another device while they stay where they are: every layer casts."""

    @staticmethod
    def install_model(model: nn.Module, **kwargs: Any) -> None:
        """Make all layers of `model` cast layers that cast. `kwargs` named the device; each call's input names it here."""
        for layer in model.modules():
            if type(layer) in _CAST_OF:
                layer.__class__ = _CAST_OF[type(layer)]
        shift_manual_cast(model, True)

    @staticmethod
    def uninstall_model(model: nn.Module) -> None:
        """The inverse."""
        for layer in model.modules():
            if isinstance(layer, CastLayer):
                layer.__class__ = _PLAIN_OF[type(layer)]
                with suppress(AttributeError):
                    del layer.parameters_manual_cast
