"""NF4 and FP4 as bitsandbytes stores them: a table of 16 numbers, and per block of weights the largest magnitude ("absmax") they are multiplied with.

Sources: Dettmers et al. 2023, "QLoRA", section 3 (NF4, double quantization) and appendix E (the table); bitsandbytes' FP4 is 1 sign, 2 exponent and
1 mantissa bits, as values of a table. With double quantization ("nested") the absmax are 8-bit indices into a second table, scaled per block of
them, plus an offset.

Buffer: absmax (fp32), or nested: table (256 fp32), scales (fp32), offset (fp32), indices (uint8); then two weights per byte, the first in the high
half. A block runs over the flattened weight and may cross rows.

Shapes: W weights, B blocks.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, prod

import torch
from torch import Tensor, nn

from backend.storage.packed import PackedFormat, PackedFormatError, PackedTensor, has_same_rows, say_misfit
from backend.storage.tables import table_on

logger = logging.getLogger(__name__)

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4 = (*_FP4_MAGNITUDES, *(-one for one in _FP4_MAGNITUDES))
TABLES = {"nf4": NF4, "fp4": FP4}
BLOCK = 64
_LEAST_ABSMAX = 1e-38
_FLOAT_BYTES = 4
_NESTED_TABLE = 256


@dataclass(frozen=True, slots=True)
class FourBitFormat(PackedFormat):
    """`kind`: "nf4" or "fp4". `block`: weights per absmax. `nested_block`: absmax per scale of double quantization, 0 without it."""

    shape: tuple[int, ...]
    kind: str
    block: int = BLOCK
    nested_block: int = 0

    @property
    def title(self) -> str:
        return self.kind.upper()

    @property
    def num_blocks(self) -> int:
        return ceil(prod(self.shape) / self.block)

    @property
    def num_bytes(self) -> int:
        return self._absmax_bytes + ceil(prod(self.shape) / 2)

    @property
    def _absmax_bytes(self) -> int:
        if not self.nested_block:
            return self.num_blocks * _FLOAT_BYTES
        return (_NESTED_TABLE + ceil(self.num_blocks / self.nested_block) + 1) * _FLOAT_BYTES + self.num_blocks

    def dequantize(self, buffer_N: Tensor, out_dtype: torch.dtype) -> Tensor:
        absmax_B1, codes = self.absmax(buffer_N).reshape(-1, 1), buffer_N[self._absmax_bytes :]
        kernel = find_kernel() if buffer_N.device.type in _KERNEL_DEVICES and not (prod(self.shape) % self.block or self.shape[-1] % 2) else None
        if kernel is not None:
            return kernel(codes, absmax_B1.flatten(), self.block, self.kind, list(self.shape), out_dtype)
        pairs = nn.functional.embedding(codes.int(), table_on(_PAIRS[self.kind], buffer_N.device))  # the two weights of each byte
        count = prod(self.shape)
        if count % self.block:
            padded = nn.functional.pad(pairs.flatten()[:count], (0, -count % self.block)).reshape(-1, self.block)
            return (padded * absmax_B1).flatten()[:count].to(out_dtype).reshape(self.shape)
        if out_dtype == torch.float32:
            return pairs.reshape(-1, self.block).mul_(absmax_B1).reshape(self.shape)
        value = torch.empty((self.num_blocks, self.block), dtype=out_dtype, device=buffer_N.device)
        return torch.mul(pairs.reshape(-1, self.block), absmax_B1, out=value).reshape(self.shape)

    def absmax(self, buffer_N: Tensor) -> Tensor:
        """The blocks' largest magnitudes (B,), fp32."""
        if not self.nested_block:
            return buffer_N[: self._absmax_bytes].view(torch.float32)
        table, scales, offset, indices, _ = self.nested_parts(buffer_N)
        spread = scales.repeat_interleave(self.nested_block)[: self.num_blocks]
        return nn.functional.embedding(indices.int(), table[:, None]).flatten() * spread + offset

    def nested_parts(self, buffer_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Table (256,), scales and offset of double quantization, fp32, the absmax' indices (B,), and codes, two per byte; views."""
        num_floats = _NESTED_TABLE + ceil(self.num_blocks / self.nested_block) + 1
        floats, codes = buffer_N[: num_floats * _FLOAT_BYTES].view(torch.float32), buffer_N[self._absmax_bytes :]
        return floats[:_NESTED_TABLE], floats[_NESTED_TABLE:-1], floats[-1], buffer_N[num_floats * _FLOAT_BYTES : self._absmax_bytes], codes

    def parts(self, buffer_N: Tensor) -> tuple[Tensor, Tensor]:
        """Largest magnitudes (B,), fp32, and codes, two per byte."""
        return self.absmax(buffer_N), buffer_N[self._absmax_bytes :]

    def quantize(self, value: Tensor, *, seed: int, near_N: Tensor | None = None) -> Tensor:
        """To the nearest number of the table, without double quantization; bitsandbytes' codes on a CPU.

        Raises: PackedFormatError for a doubly quantized format.
        """
        if self.nested_block:
            raise PackedFormatError("Weights are not quantized twice; use the format without double quantization.")
        flat = value.detach().float().flatten()
        blocks = nn.functional.pad(flat, (0, -flat.numel() % self.block)).reshape(-1, self.block)
        absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * (1 / absmax.clamp(min=_LEAST_ABSMAX))[:, None]).clamp(-1, 1)
        numbers, codes_in_order = _sorted_codes(self.kind)
        table = torch.tensor(numbers, device=value.device)
        borders = (table[1:] + table[:-1]) / 2
        places = torch.bucketize(scaled, borders).flatten()[: flat.numel()]
        codes = torch.tensor(codes_in_order, dtype=torch.uint8, device=value.device)[places]
        return join_four_bit(absmax, _two_per_byte(codes))

    @property
    def can_quantize(self) -> bool:  # type: ignore[override]  # a constant for the other formats
        return not self.nested_block

    def cut(self, first: int, end: int) -> FourBitFormat:
        """Rows have no double quantization, whose blocks of absmax they would cross."""
        row_length = prod(self.shape[1:])
        start, stop = first * row_length, end * row_length
        if start % self.block or (stop % self.block and stop != prod(self.shape)):
            raise PackedFormatError(
                f"Rows {first} to {end} of a weight of shape {self.shape} in {self.title} cannot be cut out: blocks of {self.block} cross rows of "
                f"{row_length}. Use another version of this model."
            )
        return replace(self, shape=(end - first, *self.shape[1:]), nested_block=0)

    def rows(self, buffer_N: Tensor, first: int, end: int) -> Tensor:
        self.cut(first, end)
        start, stop = (row * prod(self.shape[1:]) for row in (first, end))
        absmax = self.absmax(buffer_N)[start // self.block : ceil(stop / self.block)]
        return join_four_bit(absmax, buffer_N[self._absmax_bytes + start // 2 : self._absmax_bytes + ceil(stop / 2)])

    def take_rows(self, buffer_N: Tensor, indices_R: Tensor) -> tuple[FourBitFormat, Tensor]:
        form = self.cut(0, 1)  # one row has whole blocks
        absmax_B, codes = self.parts(buffer_N)
        rows = absmax_B.reshape(self.shape[0], -1)[indices_R], codes.reshape(self.shape[0], -1)[indices_R]
        return replace(form, shape=(indices_R.numel(), *self.shape[1:])), join_four_bit(*rows)

    def concat(self, others: Sequence[tuple[FourBitFormat, Tensor]]) -> tuple[FourBitFormat, Tensor]:
        fits = all((one.kind, one.block, one.shape[1:]) == (self.kind, self.block, self.shape[1:]) for one, _ in others)
        if not fits or any(prod(one.shape) % self.block for one, _ in others[:-1]):
            raise PackedFormatError(f"Rows of {', '.join(f'{one.shape} in {one.title}' for one, _ in others)} cannot be stacked.")
        absmax = torch.cat([one.absmax(buffer) for one, buffer in others])
        codes = torch.cat([buffer[one._absmax_bytes :] for one, buffer in others])
        shape = (sum(one.shape[0] for one, _ in others), *self.shape[1:])
        return replace(self, shape=shape, nested_block=0), join_four_bit(absmax, codes)

    def reshaped(self, shape: tuple[int, ...]) -> FourBitFormat:
        if not has_same_rows(self, shape):
            raise PackedFormatError(say_misfit(self, shape))
        return replace(self, shape=shape)


_KERNEL_DEVICES = frozenset({"cpu", "cuda"})


@cache
def find_kernel() -> Callable[..., Tensor] | None:
    """bitsandbytes' own dequantization, one pass over memory, where the user has installed that package; None without it. Its values are the same.

    Not together with the package `kernels`, with which bitsandbytes fetches code from a hub when it is imported.
    """
    if importlib.util.find_spec("bitsandbytes") is None or importlib.util.find_spec("kernels") is not None:
        return None
    try:
        importlib.import_module("bitsandbytes")  # registers torch.ops.bitsandbytes; a second, so only when four bits are first read
        kernel: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit.default
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        logger.warning("bitsandbytes is installed but cannot be used (%s); four-bit weights are dequantized without it.", str(error)[:300])
        return None
    return kernel


def join_four_bit(absmax: Tensor, codes: Tensor, nested: Sequence[Tensor] = ()) -> Tensor:
    """The buffer. `codes`: two weights per byte. `nested`: table, scales and offset (fp32) if `absmax` are indices (uint8)."""
    parts = [*(one.float() for one in nested), absmax if nested else absmax.float(), codes]
    return torch.cat([one.contiguous().reshape(-1).view(torch.uint8) for one in parts])


def quantize_four_bit(value: Tensor, kind: str, *, block: int = BLOCK) -> PackedTensor:
    """A plain weight stored in "nf4" or "fp4"."""
    form = FourBitFormat(tuple(value.shape), kind, block)
    return PackedTensor(form.quantize(value, seed=0), form)


def _two_per_byte(codes: Tensor) -> Tensor:
    """Codes (uint8, below 16) in pairs, the first in the high half."""
    pairs = nn.functional.pad(codes, (0, codes.numel() % 2)).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def _pairs_of_bytes(numbers: Sequence[float]) -> Tensor:
    """The two numbers of every byte (256, 2), fp32."""
    table = torch.tensor(numbers)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


def _nf4_pairs() -> Tensor:
    return _pairs_of_bytes(NF4)


def _fp4_pairs() -> Tensor:
    return _pairs_of_bytes(FP4)


_PAIRS = {"nf4": _nf4_pairs, "fp4": _fp4_pairs}


def _sorted_codes(kind: str) -> tuple[list[float], list[int]]:
    """The table's numbers in ascending order, and their codes. FP4 has two zeros: bitsandbytes takes the second for small positive numbers."""
    codes = sorted(range(len(TABLES[kind])), key=lambda code: (TABLES[kind][code], code))
    return [TABLES[kind][code] for code in codes], codes
