"""Streams models larger than their budget: some layers stay on the device, the others are there only during their own forward.

`choose_resident_layers` is pure. Hooks on the layers do the rest, so the network need not know. An embedding table is never copied: its rows are
looked up on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from backend.memory.fetching import AheadFetcher, CudaAheadCopies, DirectFetcher, Fetcher, is_pinned
from backend.memory.module_bytes import as_same_kind
from backend.storage.kinds import stored_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerBytes:
    """Bytes of one module's own tensors (not its children's). `fetch_bytes` of them go to the device when the layer streams."""

    name: str
    own_bytes: int
    fetch_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamedModel:
    """What `start_streaming` did within `budget_bytes`, and what `stop_streaming` needs to undo it."""

    budget_bytes: int
    resident_bytes: int
    streamed_bytes: int
    handles: tuple[RemovableHandle, ...]


def list_layers(module: nn.Module) -> tuple[LayerBytes, ...]:
    """Every module of the tree that has its own tensors."""
    sizes = ((name, child, _own_bytes(child)) for name, child in module.named_modules())
    return tuple(
        LayerBytes(name=name, own_bytes=own_bytes, fetch_bytes=0 if isinstance(child, nn.Embedding) else own_bytes)
        for name, child, own_bytes in sizes
        if own_bytes
    )


def choose_resident_layers(layers: Sequence[LayerBytes], budget_bytes: int, layers_in_flight: int = 1) -> frozenset[str]:
    """Names of the layers that stay on the device: from small to large, while the budget lasts.

    Large layers stream because a few large copies are cheaper than many small ones. Unless everything fits, the budget also reserves room for the
    `layers_in_flight` largest layers, which are on the device while they compute or are copied ahead.
    """
    total_bytes = sum(layer.own_bytes for layer in layers)
    if total_bytes <= budget_bytes:
        return frozenset(layer.name for layer in layers)
    largest_bytes = sorted((layer.fetch_bytes for layer in layers), reverse=True)[:layers_in_flight]
    room_bytes = max(0, budget_bytes - sum(largest_bytes))
    chosen: set[str] = set()
    for layer in sorted(layers, key=lambda one: (one.own_bytes, one.name)):
        if layer.own_bytes > room_bytes:
            break
        chosen.add(layer.name)
        room_bytes -= layer.own_bytes
    return frozenset(chosen)


@torch.inference_mode(mode=False)
@torch.no_grad()
def start_streaming(module: nn.Module, device: torch.device, budget_bytes: int, *, pin: bool = False, ahead: bool = False) -> StreamedModel:
    """Place what the budget allows on `device`, leave the rest on the host and fetch it layer by layer.

    With `pin` the host copies are page-locked, so that copies can overlap with computation (CUDA only). With `ahead` each layer is copied while
    the one before it computes, which needs room for one more layer.
    """
    layers, by_name = list_layers(module), dict(module.named_modules())
    fetcher = _choose_fetcher(by_name, device, ahead=ahead)
    resident = choose_resident_layers(layers, budget_bytes, fetcher.layers_in_flight)
    handles: list[RemovableHandle] = []
    for layer in layers:
        child = by_name[layer.name]
        _place_own_tensors(child, device if layer.name in resident else torch.device("cpu"), pin=(pin or ahead) and layer.name not in resident)
        if layer.name not in resident:
            handles += _look_up_on_host(child, device) if isinstance(child, nn.Embedding) else _fetch_for_forward(layer.name, child, device, fetcher)
    streamed_bytes = sum(layer.own_bytes for layer in layers if layer.name not in resident)
    return StreamedModel(
        budget_bytes=budget_bytes,
        resident_bytes=sum(layer.own_bytes for layer in layers) - streamed_bytes,
        streamed_bytes=streamed_bytes,
        handles=tuple(handles),
    )


def _choose_fetcher(by_name: Mapping[str, nn.Module], device: torch.device, *, ahead: bool) -> Fetcher:
    if not ahead or device.type != "cuda":
        return DirectFetcher(device)
    return AheadFetcher(lambda name: [tensor for _, _, tensor in _own_tensors(by_name[name])], CudaAheadCopies(device))


def stop_streaming(streamed: StreamedModel) -> None:
    """Remove the hooks. Weights stay where they are: resident ones on the device, streamed ones on the host."""
    for handle in streamed.handles:
        handle.remove()


def _own_tensors(module: nn.Module) -> list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]]:
    registries: tuple[dict[str, torch.Tensor | None], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
    return [(registry, name, tensor) for registry in registries for name, tensor in registry.items() if tensor is not None]


def _own_bytes(module: nn.Module) -> int:
    return stored_bytes(tensor for _, _, tensor in _own_tensors(module))


def _place_own_tensors(module: nn.Module, device: torch.device, *, pin: bool) -> None:
    for registry, name, tensor in _own_tensors(module):
        placed = tensor.detach().to(device)
        if pin and torch.cuda.is_available() and not is_pinned(placed):
            placed = placed.pin_memory()
        if placed.device != tensor.device or pin:
            registry[name] = as_same_kind(placed, tensor)


def _look_up_on_host(module: nn.Embedding, device: torch.device) -> list[RemovableHandle]:
    """Send indices to the host and the looked-up rows to the device."""

    def to_host(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_follow(arg, torch.device("cpu")) for arg in args)

    def to_device(layer: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.to(device)

    return [module.register_forward_pre_hook(to_host, prepend=True), module.register_forward_hook(to_device)]


def _fetch_for_forward(name: str, module: nn.Module, device: torch.device, fetcher: Fetcher) -> list[RemovableHandle]:
    """Fetch the weights before the layer's forward, and put the host's tensors back after it, even if it fails.

    Also moves the inputs: a caller that checked where the layer's weights are got the host.
    """
    host: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []

    def fetch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        host[:] = _own_tensors(layer)
        arrived = fetcher.fetch(name, [tensor for _, _, tensor in host])
        for (registry, key, tensor), there in zip(host, arrived):
            registry[key] = as_same_kind(there, tensor)
        return tuple(_follow(arg, device) for arg in args), {key: _follow(value, device) for key, value in kwargs.items()}

    def release(layer: nn.Module, args: object, output: object) -> None:
        for registry, key, tensor in host:
            registry[key] = tensor
        host.clear()
        fetcher.release(name, has_failed=output is None)

    return [module.register_forward_pre_hook(fetch, prepend=True, with_kwargs=True), module.register_forward_hook(release, always_call=True)]


def _follow(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) and value.dim() > 0 else value
