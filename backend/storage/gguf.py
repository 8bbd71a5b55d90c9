"""GGUF's block types as formats of packed weights. A block lies within a row, so rows are cut out as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from backend.storage.fusing import dequantize_fused
from backend.storage.gguf_blocks import BLOCK_TYPES, BlockType
from backend.storage.packed import PackedFormat, PackedFormatError, PackedTensor, has_same_rows, say_misfit


@dataclass(frozen=True, slots=True)
class GgufFormat(PackedFormat):
    """`kind`: a key of BLOCK_TYPES. The buffer is the blocks, row after row."""

    shape: tuple[int, ...]
    kind: str

    def __post_init__(self) -> None:
        if prod(self.shape) % self.block_type.weights:
            raise PackedFormatError(
                f"A weight of shape {self.shape} cannot be stored in {self.title}, whose blocks have {self.block_type.weights} numbers."
            )

    @property
    def block_type(self) -> BlockType:
        return BLOCK_TYPES[self.kind]

    @property
    def title(self) -> str:
        return f"GGUF {self.kind}"

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // self.block_type.weights * self.block_type.num_bytes

    @property
    def can_quantize(self) -> bool:  # type: ignore[override]  # a constant for other formats
        return self.block_type.write is not None

    def dequantize(self, buffer_N: Tensor, out_dtype: torch.dtype) -> Tensor:
        return dequantize_fused(self.block_type, buffer_N.reshape(-1, self.block_type.num_bytes), out_dtype).reshape(self.shape)

    def quantize(self, value: Tensor, *, seed: int, near_N: Tensor | None = None) -> Tensor:
        if self.block_type.write is None:
            return PackedFormat.quantize(self, value, seed=seed)
        return self.block_type.write(value.detach().float().reshape(-1, self.block_type.weights)).reshape(-1)

    def cut(self, first: int, end: int) -> GgufFormat:
        if prod(self.shape[1:]) % self.block_type.weights:
            raise PackedFormatError(
                f"Rows {first} to {end} of a weight of shape {self.shape} in {self.title} cannot be cut out: its blocks cross rows. "
                "Use another version of this model."
            )
        return replace(self, shape=(end - first, *self.shape[1:]))

    def rows(self, buffer_N: Tensor, first: int, end: int) -> Tensor:
        self.cut(first, end)
        row_bytes = self.num_bytes // self.shape[0]
        return buffer_N[first * row_bytes : end * row_bytes]

    def take_rows(self, buffer_N: Tensor, indices_R: Tensor) -> tuple[GgufFormat, Tensor]:
        form = self.cut(0, indices_R.numel())
        return form, buffer_N.reshape(self.shape[0], -1)[indices_R].reshape(-1)

    def concat(self, others: Sequence[tuple[GgufFormat, Tensor]]) -> tuple[GgufFormat, Tensor]:
        if any((form.kind, form.shape[1:]) != (self.kind, self.shape[1:]) for form, _ in others):
            raise PackedFormatError(f"Rows of {', '.join(f'{one.shape} in {one.title}' for one, _ in others)} cannot be stacked.")
        return replace(self, shape=(sum(form.shape[0] for form, _ in others), *self.shape[1:])), torch.cat([buffer for _, buffer in others])

    def reshaped(self, shape: tuple[int, ...]) -> GgufFormat:
        if not has_same_rows(self, shape):
            raise PackedFormatError(say_misfit(self, shape))
        return replace(self, shape=shape)


def quantize_gguf(value: Tensor, kind: str) -> PackedTensor:
    """A plain weight stored in one of GGUF's types. Raises: PackedFormatError for a type without a quantizer, or rows that blocks do not divide."""
    form = GgufFormat(tuple(value.shape), kind)
    return PackedTensor(form.quantize(value, seed=0), form)
