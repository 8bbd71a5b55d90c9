"""mxfp8 and nvfp4 as comfy-kitchen stores them: small floating-point numbers with one scale per block of a row.

mxfp8 (OCP Microscaling Formats 1.0): e4m3 numbers; a block of 32 has a power of two as its scale (e8m0). nvfp4: e2m1 numbers, two per byte, the first
in the high half; a block of 16 has an e4m3 scale, and the weight an fp32 scale of the scales. Files have the scales of blocks in the order that
cuBLAS reads (`order_scales`); a buffer has them row after row, so that rows can be cut out.

Buffer: fp32 scales (nvfp4: one per weight or one per row), scales of blocks, numbers.

Shapes: O rows, C numbers per row, B blocks per row, K numbers per block, S fp32 scales (0, 1 or O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backend.storage.fp8 import read_fp8
from backend.storage.packed import PackedFormat, PackedFormatError, has_same_rows, say_misfit
from backend.storage.tables import table_on

_FLOAT_BYTES = 4
_TILE_ROWS, _TILE_BLOCKS = 128, 4
_E4M3_LARGEST, _E2M1_LARGEST = 448.0, 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEAST_EXPONENT, _EXPONENT_BIAS = -127, 127


class _Kind(NamedTuple):
    """`block`: numbers per scale. `per_byte`: numbers per byte."""

    title: str
    block: int
    per_byte: int


KINDS = {"mxfp8": _Kind("mxfp8", 32, 1), "nvfp4": _Kind("nvfp4", 16, 2)}


@dataclass(frozen=True, slots=True)
class BlockScaledFormat(PackedFormat):
    """`kind`: "mxfp8" or "nvfp4". `num_scales`: fp32 scales, 0 for mxfp8, 1 or the number of rows for nvfp4."""

    shape: tuple[int, ...]
    kind: str
    num_scales: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or prod(self.shape[1:]) % self.facts.block:
            raise PackedFormatError(
                f"A weight of shape {self.shape} cannot be stored in {self.title}, whose rows are divided into blocks of {self.facts.block} numbers."
            )

    @property
    def facts(self) -> _Kind:
        return KINDS[self.kind]

    @property
    def title(self) -> str:
        return self.facts.title

    @property
    def blocks_per_row(self) -> int:
        return prod(self.shape[1:]) // self.facts.block

    @property
    def num_bytes(self) -> int:
        return self._codes_start + prod(self.shape) // self.facts.per_byte

    @property
    def _codes_start(self) -> int:
        return self.num_scales * _FLOAT_BYTES + self.shape[0] * self.blocks_per_row

    def dequantize(self, buffer_N: Tensor, out_dtype: torch.dtype) -> Tensor:
        scales_S1, blocks_OB, codes = self.parts(buffer_N)
        is_mxfp8 = self.kind == "mxfp8"
        scales_OB = _read_e8m0(blocks_OB) if is_mxfp8 else scales_S1 * read_fp8(blocks_OB, torch.float8_e4m3fn, torch.float32)
        numbers = read_fp8(codes, torch.float8_e4m3fn, out_dtype) if is_mxfp8 else _read_e2m1(codes)
        value = torch.empty((*blocks_OB.shape, self.facts.block), dtype=out_dtype, device=buffer_N.device)
        return torch.mul(numbers.reshape(value.shape), scales_OB[..., None], out=value).reshape(self.shape)

    def quantize(self, value: Tensor, *, seed: int, near_N: Tensor | None = None) -> Tensor:
        """To nearest."""
        value_OBK = value.detach().float().reshape(self.shape[0], self.blocks_per_row, self.facts.block)
        return _quantize_mxfp8(value_OBK) if self.kind == "mxfp8" else _quantize_nvfp4(value_OBK, self.num_scales)

    def cut(self, first: int, end: int) -> BlockScaledFormat:
        return replace(self, shape=(end - first, *self.shape[1:]), num_scales=self.num_scales if self.num_scales < 2 else end - first)

    def rows(self, buffer_N: Tensor, first: int, end: int) -> Tensor:
        scales_S1, blocks_OB, codes = self.parts(buffer_N)
        kept = scales_S1 if self.num_scales < 2 else scales_S1[first:end]
        return join_block_scaled(kept, blocks_OB[first:end], codes.reshape(self.shape[0], -1)[first:end])

    def take_rows(self, buffer_N: Tensor, indices_R: Tensor) -> tuple[BlockScaledFormat, Tensor]:
        scales_S1, blocks_OB, codes = self.parts(buffer_N)
        kept = scales_S1 if self.num_scales < 2 else scales_S1[indices_R]
        return self.cut(0, indices_R.numel()), join_block_scaled(kept, blocks_OB[indices_R], codes.reshape(self.shape[0], -1)[indices_R])

    def concat(self, others: Sequence[tuple[BlockScaledFormat, Tensor]]) -> tuple[BlockScaledFormat, Tensor]:
        """Parts of nvfp4 get one fp32 scale per row."""
        if any((form.kind, form.shape[1:]) != (self.kind, self.shape[1:]) for form, _ in others):
            raise PackedFormatError(f"Rows of {', '.join(f'{one.shape} in {one.title}' for one, _ in others)} cannot be stacked.")
        parts = [form.parts(buffer) for form, buffer in others]
        num_rows = sum(form.shape[0] for form, _ in others)
        scales = torch.cat([scales_S1.expand(-1 if scales_S1.shape[0] != 1 else blocks_OB.shape[0], 1) for scales_S1, blocks_OB, _ in parts])
        form = replace(self, shape=(num_rows, *self.shape[1:]), num_scales=scales.shape[0])
        return form, join_block_scaled(scales, *(torch.cat([part[place].reshape(-1) for part in parts]) for place in (1, 2)))

    def reshaped(self, shape: tuple[int, ...]) -> BlockScaledFormat:
        if not has_same_rows(self, shape):
            raise PackedFormatError(say_misfit(self, shape))
        return replace(self, shape=shape)

    def parts(self, buffer_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 scales (S, 1), scales of blocks (O, B) and numbers, both as uint8; views."""
        split = self.num_scales * _FLOAT_BYTES
        scales_S1 = buffer_N[:split].view(torch.float32).reshape(-1, 1)
        return scales_S1, buffer_N[split : self._codes_start].reshape(self.shape[0], -1), buffer_N[self._codes_start :]


def join_block_scaled(scales: Tensor, blocks: Tensor, codes: Tensor) -> Tensor:
    """The buffer of fp32 scales, scales of blocks row after row, and numbers."""
    parts = [scales.float(), blocks, codes]
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts])


# the order of scales in files


def ordered_scale_shape(num_rows: int, num_blocks: int) -> tuple[int, int]:
    """The shape in which files have the scales of blocks: whole tiles of 128 rows and 4 blocks."""
    return ceil(num_rows / _TILE_ROWS) * _TILE_ROWS, ceil(num_blocks / _TILE_BLOCKS) * _TILE_BLOCKS


def order_scales(scales_OB: Tensor) -> Tensor:
    """Scales (uint8) from rows into the order of cuBLAS' block-scaled products: tiles of 128 rows and 4 blocks, row r of a tile before row r + 32."""
    num_rows, num_blocks = scales_OB.shape
    whole_rows, whole_blocks = ordered_scale_shape(num_rows, num_blocks)
    padded = nn.functional.pad(scales_OB, (0, whole_blocks - num_blocks, 0, whole_rows - num_rows))
    tiles = padded.reshape(whole_rows // _TILE_ROWS, 4, 32, whole_blocks // _TILE_BLOCKS, _TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(whole_rows, whole_blocks)


def unorder_scales(ordered: Tensor, num_rows: int, num_blocks: int) -> Tensor:
    """`order_scales` undone: (O, B)."""
    whole_rows, whole_blocks = ordered_scale_shape(num_rows, num_blocks)
    tiles = ordered.reshape(whole_rows // _TILE_ROWS, whole_blocks // _TILE_BLOCKS, 32, 4, _TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(whole_rows, whole_blocks)[:num_rows, :num_blocks]


# numbers


def _read_e8m0(exponents: Tensor) -> Tensor:
    """2 ** (exponent - 127) in fp32; 0 for exponent 0, as comfy-kitchen has it."""
    return (exponents.int() << 23).view(torch.float32)


def _read_e2m1(codes: Tensor) -> Tensor:
    """The two numbers of each byte (..., 2)."""
    return nn.functional.embedding(codes.int(), table_on(_e2m1_pairs, codes.device))


def _e2m1_pairs() -> Tensor:
    table = torch.tensor([*_E2M1, *(-number for number in _E2M1)])
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


def _quantize_mxfp8(value_OBK: Tensor) -> Tensor:
    needed_OB = value_OBK.abs().amax(dim=-1) / _E4M3_LARGEST
    exponents_OB = torch.ceil(torch.log2(needed_OB.clamp(min=2.0**_LEAST_EXPONENT))) + _EXPONENT_BIAS
    blocks_OB = torch.where(needed_OB == 0, torch.zeros_like(exponents_OB), exponents_OB.clamp(0, 254)).to(torch.uint8)
    scales_OB = _read_e8m0(blocks_OB)
    scaled_OBK = value_OBK / torch.where(scales_OB == 0, torch.ones_like(scales_OB), scales_OB)[..., None]
    codes = scaled_OBK.clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
    return join_block_scaled(needed_OB.new_empty(0, 1), blocks_OB, codes)


def _quantize_nvfp4(value_OBK: Tensor, num_scales: int) -> Tensor:
    largest_O1 = value_OBK.abs().amax(dim=(1, 2))[:, None]
    scales_S1 = (largest_O1 if num_scales > 1 else largest_O1.amax().reshape(1, 1)) / (_E4M3_LARGEST * _E2M1_LARGEST)
    needed_OB = value_OBK.abs().amax(dim=-1) / _E2M1_LARGEST
    safe_S1 = torch.where(scales_S1 == 0, torch.ones_like(scales_S1), scales_S1)
    blocks_OB = (needed_OB / safe_S1).clamp(max=_E4M3_LARGEST).to(torch.float8_e4m3fn)
    steps_OB = safe_S1 * blocks_OB.float()
    scaled_OBK = value_OBK / torch.where(steps_OB == 0, torch.ones_like(steps_OB), steps_OB)[..., None]
    scaled_OBK = torch.where(steps_OB[..., None] == 0, torch.zeros_like(scaled_OBK), scaled_OBK)
    return join_block_scaled(scales_S1, blocks_OB.view(torch.uint8), _write_e2m1(scaled_OBK))


def _write_e2m1(value: Tensor) -> Tensor:
    """Codes of the nearest numbers, ties to even codes, two per byte."""
    numbers = torch.tensor(_E2M1, device=value.device)
    borders, magnitude = (numbers[1:] + numbers[:-1]) / 2, value.abs()
    up, down = torch.bucketize(magnitude, borders, right=True), torch.bucketize(magnitude, borders)
    places = torch.where(up % 2 == 0, up, down)
    codes = (places + 8 * torch.signbit(value)).to(torch.uint8).reshape(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]
