"""KeyMap: maps a network's weight names to those in the family's original files and back, with rows if several of our weights form one of theirs.

Loader, saver and LoRA use it. Example: diffusers splits `double_blocks.0.img_attn.qkv` of Flux's files in three, so
`transformer_blocks.0.attn.to_k` has rows 3072 to 6144 of 9216. The files have the halves of `norm_out.linear` in reverse order.
Knows no files and no devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from backend.storage.kinds import storage_of

SAVED_DTYPE = torch.float16
"""Of packed weights that are written to a file."""


class Rows(NamedTuple):
    """Rows `first` up to, but not including, `end` of an original matrix with `total` rows. `swapped`: our first half is the original's second."""

    first: int
    end: int
    total: int
    swapped: bool = False


class OriginalPlace(NamedTuple):
    """A weight's place in the original layout; `rows` is None for a whole weight."""

    key: str
    rows: Rows | None


@dataclass(frozen=True, kw_only=True)
class KeyMap:
    """`modules`: our module name -> name in the original layout; the longest leading name counts, other names are the same in both.

    `rows`: our module name -> its rows of the original. `respelled`: ending of original names -> spelling in some files.
    `lora_names`: further LoRA name for a layer -> our modules that form it, with their rows.
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    respelled: Mapping[str, str] = field(default_factory=dict)
    lora_names: Mapping[str, Mapping[str, Rows]] = field(default_factory=dict)

    def original(self, key: str) -> OriginalPlace:
        """The place of our weight or module in the original layout."""
        head = key
        while head:
            if head in self.modules:
                return OriginalPlace(self.modules[head] + key[len(head) :], self.rows.get(head))
            head = head.rpartition(".")[0]
        return OriginalPlace(key, None)

    def places(self, key: str) -> tuple[OriginalPlace, ...]:
        """Possible places of our weight in files: the original name first, then its other spellings."""
        place = self.original(key)
        others = (place.key.removesuffix(ending) + other for ending, other in self.respelled.items() if place.key.endswith(ending))
        return (place, *(OriginalPlace(name, place.rows) for name in others))

    def ours(self, key: str) -> str | None:
        """Our name for a weight or module of the original layout; None if several of ours form it."""
        head = key
        while head:
            if head in self._backwards:
                module = self._backwards[head]
                return None if module in self.rows else module + key[len(head) :]
            head = head.rpartition(".")[0]
        return key

    def shared(self) -> Iterator[tuple[str, dict[str, Rows]]]:
        """Every original module that several of ours form: its name, and ours with their rows."""
        found: dict[str, dict[str, Rows]] = {}
        for module, rows in self.rows.items():
            found.setdefault(self.modules.get(module, module), {})[module] = rows
        yield from found.items()

    def to_original(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under their original names, joined where the original has one weight. Tensors are shared if only names change."""
        whole: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        for key, tensor in state_dict.items():
            place = self.original(key)
            if place.rows is None:
                whole[place.key] = tensor
            else:
                parts.setdefault(place.key, {})[place.rows.first] = swap_halves(tensor) if place.rows.swapped else tensor
        return {**whole, **{key: _join([pieces[first] for first in sorted(pieces)]) for key, pieces in parts.items()}}

    @property
    def _backwards(self) -> Mapping[str, str]:
        known: dict[str, str] | None = self.__dict__.get("_known_backwards")
        if known is None:
            known = {original: module for module, original in self.modules.items()}
            object.__setattr__(self, "_known_backwards", known)
        return known


def _join(tensors: list[Tensor]) -> Tensor:
    stored = [storage_of(tensor) for tensor in tensors]
    if any(one.is_packed for one in stored):  # files have plain tensors
        return torch.cat([one.dequantize(SAVED_DTYPE) for one in stored])
    return type(stored[0]).concat(stored).tensor if len(stored) > 1 else tensors[0]


def swap_halves(tensor: Tensor) -> Tensor:
    """The tensor with the second half of its rows first. Any storage kind is cut and joined in its stored form. Its own inverse."""
    storage, middle = storage_of(tensor), tensor.shape[0] // 2
    halves = [storage.rows(middle, tensor.shape[0]), storage.rows(0, middle)]
    return type(storage).concat(halves).tensor


def equal_rows(names: tuple[str, ...], total: int) -> dict[str, Rows]:
    """Rows of modules that share one matrix in equal parts, in order (q, k, v)."""
    length = total // len(names)
    return {name: Rows(index * length, (index + 1) * length, total) for index, name in enumerate(names)}


def cut_rows(tensor: Tensor, rows: Rows) -> Tensor:
    """These rows of a tensor. Raises: ValueError for a tensor with another number of rows."""
    if tensor.shape[0] != rows.total:
        raise ValueError(f"the tensor has {tensor.shape[0]} rows, but the original has {rows.total}")
    cut = torch.narrow(tensor, 0, rows.first, rows.end - rows.first)
    return swap_halves(cut) if rows.swapped else cut
