"""Eight bits per number and fp32 scales, one per weight or one per row: scaled fp8 (e4m3fn, e5m2) and int8. A value is a number times its scale.

Rotated int8 ("convrot") has groups of each row multiplied with a Hadamard matrix before rounding, which spreads outliers over the group; values are
rotated back (`rotation`). The buffer has the scales first, so that both parts lie on their alignment.

Shapes: O rows, C numbers per row, S scales (1 or O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from backend.storage.fp8 import MANTISSA_BITS, read_fp8, round_at_random
from backend.storage.packed import PackedFormat, PackedFormatError, PackedTensor, has_same_rows, say_misfit
from backend.storage.rotation import is_group, rotate

_TITLES = {torch.float8_e4m3fn: "fp8 e4m3 scaled", torch.float8_e5m2: "fp8 e5m2 scaled", torch.int8: "int8 scaled"}
SCALED_DTYPES = tuple(_TITLES)
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class ScaledFormat(PackedFormat):
    """`dtype`: of the numbers. `num_scales`: 1 or the number of rows. `group`: numbers of a row that are rotated together; 0 without rotation."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_scales: int = 1
    group: int = 0

    def __post_init__(self) -> None:
        if self.group and (not is_group(self.group) or prod(self.shape[1:]) % self.group):
            raise PackedFormatError(
                f"A weight of shape {self.shape} cannot be rotated in groups of {self.group}: a group is a power of 4 that divides its rows."
            )

    @property
    def title(self) -> str:
        return f"{_TITLES[self.dtype]} and rotated" if self.group else _TITLES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.num_scales * _SCALE_BYTES + prod(self.shape)

    def dequantize(self, buffer_N: Tensor, out_dtype: torch.dtype) -> Tensor:
        scales_S1, bytes_OC = self._split(buffer_N)
        readable_OC = bytes_OC.view(torch.int8) if self.dtype == torch.int8 else read_fp8(bytes_OC, self.dtype, out_dtype)
        if self.group:
            return rotate(readable_OC.float() * scales_S1, self.group).to(out_dtype).reshape(self.shape)
        value_OC = torch.empty(bytes_OC.shape, dtype=out_dtype, device=buffer_N.device)
        return torch.mul(readable_OC, scales_S1, out=value_OC).reshape(self.shape)

    def quantize(self, value: Tensor, *, seed: int, near_N: Tensor | None = None) -> Tensor:
        """To nearest. fp8 that replaces another weight is rounded at random, which preserves the mean of small changes; scales that still cover their
        row are kept."""
        value_OC = value.detach().float().reshape(self._rows, -1)
        if self.group:
            value_OC = rotate(value_OC, self.group)
        largest = 127.0 if self.dtype == torch.int8 else torch.finfo(self.dtype).max
        needed_S1 = value_OC.abs().amax(dim=1, keepdim=True).div(largest)
        if self.num_scales == 1:
            needed_S1 = needed_S1.amax().reshape(1, 1)
        kept_S1 = needed_S1 if near_N is None else self.parts(near_N)[0]
        scales_S1 = torch.where(needed_S1 <= kept_S1 * (1 + 1e-6), kept_S1, needed_S1)
        scales_S1 = torch.where(scales_S1 == 0, torch.ones_like(scales_S1), scales_S1)
        scaled_OC = (value_OC / scales_S1).clamp(-largest, largest)
        if self.dtype in MANTISSA_BITS and near_N is None:
            return join_scaled(scales_S1, scaled_OC.to(self.dtype))
        if self.dtype in MANTISSA_BITS:
            return join_scaled(scales_S1, round_at_random(scaled_OC, self.dtype, seed=seed))
        return join_scaled(scales_S1, scaled_OC.round().to(torch.int8))

    def cut(self, first: int, end: int) -> ScaledFormat:
        return replace(self, shape=(end - first, *self.shape[1:]), num_scales=1 if self.num_scales == 1 else end - first)

    def rows(self, buffer_N: Tensor, first: int, end: int) -> Tensor:
        scales_S1, numbers_OC = self.parts(buffer_N)
        return join_scaled(scales_S1 if self.num_scales == 1 else scales_S1[first:end], numbers_OC[first:end])

    def take_rows(self, buffer_N: Tensor, indices_R: Tensor) -> tuple[ScaledFormat, Tensor]:
        scales_S1, numbers_OC = self.parts(buffer_N)
        taken = numbers_OC.view(torch.uint8)[indices_R]
        return self.cut(0, indices_R.numel()), join_scaled(scales_S1 if self.num_scales == 1 else scales_S1[indices_R], taken)

    def concat(self, others: Sequence[tuple[ScaledFormat, Tensor]]) -> tuple[ScaledFormat, Tensor]:
        """Parts with different scales get one scale per row."""
        if any((form.dtype, form.group, form.shape[1:]) != (self.dtype, self.group, self.shape[1:]) for form, _ in others):
            raise PackedFormatError(f"Rows of {', '.join(f'{one.shape} in {one.title}' for one, _ in others)} cannot be stacked.")
        parts = [form.parts(buffer) for form, buffer in others]
        num_rows = sum(form._rows for form, _ in others)
        scales = torch.cat([scales_S1.expand(numbers_OC.shape[0], 1) for scales_S1, numbers_OC in parts])
        numbers = torch.cat([numbers_OC.view(torch.uint8) for _, numbers_OC in parts]).view(self.dtype)
        return replace(self, shape=(num_rows, *self.shape[1:]), num_scales=num_rows), join_scaled(scales, numbers)

    def reshaped(self, shape: tuple[int, ...]) -> ScaledFormat:
        if not has_same_rows(self, shape):
            raise PackedFormatError(say_misfit(self, shape))
        return replace(self, shape=shape)

    @property
    def _rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def parts(self, buffer_N: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (S, 1) and numbers (O, C), as views."""
        scales_S1, bytes_OC = self._split(buffer_N)
        return scales_S1, bytes_OC.view(self.dtype)

    def _split(self, buffer_N: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (S, 1) and the bytes of the numbers (O, C)."""
        split = self.num_scales * _SCALE_BYTES
        return buffer_N[:split].view(torch.float32).reshape(-1, 1), buffer_N[split:].reshape(self._rows, -1)


def join_scaled(scales: Tensor, numbers: Tensor) -> Tensor:
    """The buffer of scales (fp32) and numbers."""
    parts = [scales.float().contiguous().reshape(-1).view(torch.uint8), numbers.contiguous().reshape(-1).view(torch.uint8)]
    return torch.cat(parts)


def pack_scaled(numbers: Tensor, scales: Tensor) -> PackedTensor:
    """A weight from its numbers (fp8 or int8) and their scales: one, or one per row in any shape. Raises: PackedFormatError if they do not fit."""
    num_scales, num_rows = scales.numel(), numbers.shape[0] if numbers.ndim else 1
    if numbers.dtype not in _TITLES or num_scales not in (1, num_rows) or (scales.ndim and num_scales != max(scales.shape)):
        raise PackedFormatError(
            f"{num_scales} scales of shape {tuple(scales.shape)} do not fit numbers of shape {tuple(numbers.shape)} and type {numbers.dtype}; "
            f"one scale, or one per row, is needed"
        )
    return PackedTensor(join_scaled(scales, numbers), ScaledFormat(tuple(numbers.shape), numbers.dtype, num_scales))


def quantize_scaled(value: Tensor, dtype: torch.dtype, *, per_row: bool = False, seed: int = 0) -> PackedTensor:
    """A plain weight stored with scales."""
    form = ScaledFormat(tuple(value.shape), dtype, value.shape[0] if per_row else 1)
    return PackedTensor(form.quantize(value, seed=seed), form)
