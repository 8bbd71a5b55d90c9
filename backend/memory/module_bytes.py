"""Counts the bytes of modules and state dicts, and moves modules. Knows no budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from backend.storage.kinds import storage_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleBytes:
    """Bytes of a module's parameters and buffers; `weight_bytes` are those named "weight"."""

    total_bytes: int
    weight_bytes: int

    @property
    def other_bytes(self) -> int:
        return self.total_bytes - self.weight_bytes


def count_module_bytes(module: nn.Module, keep: Callable[[torch.Tensor], bool] = lambda tensor: True) -> ModuleBytes:
    """Bytes of the distinct tensors of `module` for which `keep` is true. A tensor with two names counts once."""
    total_bytes = weight_bytes = 0
    for name, tensor in _own_tensors_of_all(module):
        if keep(tensor):
            tensor_bytes = storage_of(tensor).stored_bytes
            total_bytes += tensor_bytes
            weight_bytes += tensor_bytes if name == "weight" else 0
    return ModuleBytes(total_bytes=total_bytes, weight_bytes=weight_bytes)


def count_bytes_on(module: nn.Module, device: torch.device) -> tuple[int, int]:
    """(bytes of `module`'s distinct tensors, bytes of those on `device`), in one walk."""
    total_bytes = here_bytes = 0
    for _, tensor in _own_tensors_of_all(module):
        tensor_bytes = storage_of(tensor).stored_bytes
        total_bytes += tensor_bytes
        here_bytes += tensor_bytes if tensor.device == device else 0
    return total_bytes, here_bytes


def _own_tensors_of_all(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Distinct parameters and buffers of the tree, with their names in their own module. Faster than nested generators."""
    seen: set[int] = set()
    pending: list[nn.Module] = [module]
    while pending:
        child = pending.pop()
        if id(child) in seen:
            continue
        seen.add(id(child))
        pending += [below for below in reversed(child._modules.values()) if below is not None]
        for registry in (child._parameters, child._buffers):
            for name, tensor in registry.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield name, tensor


def count_state_dict_bytes(state: Mapping[str, object], exclude_device: torch.device | None = None) -> int:
    """Bytes of the tensors in a state dict, except those on `exclude_device`."""
    return sum(storage_of(value).stored_bytes for value in state.values() if isinstance(value, torch.Tensor) and value.device != exclude_device)


def count_state_dict_parameters(state: Mapping[str, object]) -> int:
    """Number of elements of all tensors in a state dict."""
    return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))


def most_common_dtype(state: Mapping[str, object]) -> torch.dtype:
    """The most common dtype of the tensors in a state dict; fp32 if it is empty."""
    counts = Counter(value.dtype for value in state.values() if isinstance(value, torch.Tensor))
    return counts.most_common(1)[0][0] if counts else torch.float32


@torch.inference_mode(mode=False)
@torch.no_grad()
def move_module(module: nn.Module, device: torch.device, *, recursive: bool = True, excluded_patterns: Sequence[str] = ()) -> None:
    """Move parameters and buffers to `device`: the whole tree, or only the module's own.

    A tensor stays if its dotted name, relative to `module`, matches one of the shell-style patterns. So does everything under a module whose
    name matches. A tensor with two names is moved once and stays shared. The move runs outside inference mode, because parameters made in it
    could not be used elsewhere.
    """
    if recursive and not excluded_patterns:
        module.to(device)
        return
    moved: dict[int, torch.Tensor] = {}
    for prefix, child in module.named_modules() if recursive else (("", module),):
        if not _is_excluded(prefix, excluded_patterns):
            _move_own_tensors(child, device, prefix, excluded_patterns, moved)


def _move_own_tensors(module: nn.Module, device: torch.device, prefix: str, patterns: Sequence[str], moved: dict[int, torch.Tensor]) -> None:
    for registry in (module._parameters, module._buffers):
        for name, tensor in registry.items():
            if tensor is None or tensor.device == device or _is_excluded(f"{prefix}.{name}" if prefix else name, patterns):
                continue
            if id(tensor) not in moved:
                moved[id(tensor)] = as_same_kind(tensor.detach().to(device), tensor)
            registry[name] = moved[id(tensor)]  # type: ignore[assignment]  # one of the two kinds, as it was


def as_same_kind(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor`, wrapped as a Parameter with the same requires_grad if `like` is one."""
    return nn.Parameter(tensor, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def _is_excluded(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the name or the name of a module above it."""
    parts = name.split(".") if name else []
    heads = [".".join(parts[: length + 1]) for length in range(len(parts))]
    return any(fnmatchcase(head, pattern) for head in heads for pattern in patterns)
