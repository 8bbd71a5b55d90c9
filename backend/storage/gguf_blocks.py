"""Dequantizes and quantizes blocks of GGUF's types. A block is a fixed number of weights of one row in a fixed number of bytes.

Every reader returns integers ("codes") and what they are multiplied with; `dequantize_blocks` multiplies, subtracts minima where the type has them,
and rounds once. Layouts: ggml's `ggml-common.h`; results are those of the `gguf` package bit for bit (a test compares them).

Shapes: B blocks, N bytes per block, G groups of a block with one scale, K weights per group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backend.storage import gguf_grids
from backend.storage.tables import table_on


class Scaled(NamedTuple):
    """A block's weights: codes (B, G, K) times scales (B, G or 1, 1), fp32, minus minima (B, G or 1, 1)."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None


class BlockType(NamedTuple):
    """One of GGUF's types. `number` is its number in files. `write`: None for a type without a quantizer."""

    number: int
    weights: int
    num_bytes: int
    read: Callable[[Tensor], Scaled]
    write: Callable[[Tensor], Tensor] | None = None


def dequantize_blocks(kind: BlockType, blocks_BN: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The weights (B, weights per block) in `out_dtype`."""
    codes, scales, minima = kind.read(blocks_BN)
    value = torch.empty(codes.shape, dtype=out_dtype, device=blocks_BN.device)
    if minima is None:
        torch.mul(codes, scales, out=value)
    elif out_dtype == torch.float32:  # without another tensor of that size
        torch.mul(codes, scales, out=value).sub_(minima)
    else:
        torch.sub(codes * scales, minima, out=value)
    return value.reshape(blocks_BN.shape[0], kind.weights)


# reading bits


def _half(blocks_BN: Tensor, first: int) -> Tensor:
    """The fp16 number at byte `first` of each block (B, 1, 1), as fp32."""
    return blocks_BN[:, first : first + 2].view(torch.float16).float()[:, :, None]


def _spread(bytes_BK: Tensor, bits: int) -> Tensor:
    """Every byte cut into fields of `bits` bits, the lowest first: (B, fields, K)."""
    count, mask = 8 // bits, (1 << bits) - 1
    if torch.compiler.is_compiling():  # one kernel in the end, which writes no parts
        return torch.stack([bytes_BK >> (bits * place) & mask for place in range(count)], dim=1)
    fields = torch.empty((bytes_BK.shape[0], count, bytes_BK.shape[1]), dtype=torch.uint8, device=bytes_BK.device)
    torch.bitwise_and(bytes_BK, mask, out=fields[:, 0])
    for place in range(1, count - 1):
        torch.bitwise_right_shift(bytes_BK, bits * place, out=fields[:, place])
        fields[:, place].bitwise_and_(mask)
    torch.bitwise_right_shift(bytes_BK, bits * (count - 1), out=fields[:, count - 1])
    return fields


def _fields(blocks_BN: Tensor, first: int, end: int, bits: int, run: int) -> Tensor:
    """Fields of bytes `first` to `end` in their order in the weight, (B, -1): each run of `run` bytes has the first field of all its bytes, then
    the second of all."""
    return _spread(blocks_BN[:, first:end].reshape(-1, run), bits).reshape(blocks_BN.shape[0], -1)


def _words(bytes_BK: Tensor, dtype: torch.dtype) -> Tensor:
    """Little-endian unsigned integers of 2 or 4 bytes, as int64."""
    mask = 0xFFFF if dtype == torch.int16 else 0xFFFFFFFF
    return bytes_BK.contiguous().view(dtype).long().bitwise_and_(mask)


def _minus(codes: Tensor, number: int) -> Tensor:
    """uint8 codes below 128, less a number, as int8."""
    return codes.view(torch.int8).sub_(number)


# types with blocks of 32


def _read_q4_0(blocks_BN: Tensor) -> Scaled:
    return Scaled(_minus(_fields(blocks_BN, 2, 18, 4, 16), 8)[:, None], _half(blocks_BN, 0))


def _read_q4_1(blocks_BN: Tensor) -> Scaled:
    return Scaled(_fields(blocks_BN, 4, 20, 4, 16)[:, None], _half(blocks_BN, 0), -_half(blocks_BN, 2))


def _fifth_bits(blocks_BN: Tensor, first: int) -> Tensor:
    """The high bits of 32 weights from 4 bytes, (B, 32)."""
    return _spread(blocks_BN[:, first : first + 4], 1).transpose(1, 2).reshape(-1, 32)


def _read_q5_0(blocks_BN: Tensor) -> Scaled:
    codes = _fields(blocks_BN, 6, 22, 4, 16).add_(_fifth_bits(blocks_BN, 2), alpha=16)
    return Scaled(_minus(codes, 16)[:, None], _half(blocks_BN, 0))


def _read_q5_1(blocks_BN: Tensor) -> Scaled:
    codes = _fields(blocks_BN, 8, 24, 4, 16).add_(_fifth_bits(blocks_BN, 4), alpha=16)
    return Scaled(codes[:, None], _half(blocks_BN, 0), -_half(blocks_BN, 2))


def _read_q8_0(blocks_BN: Tensor) -> Scaled:
    return Scaled(blocks_BN[:, None, 2:].view(torch.int8), _half(blocks_BN, 0))


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Doubled, so that they are whole numbers; their scales are halved."""


def _iq4_table() -> Tensor:
    return torch.tensor(_IQ4, dtype=torch.float32)[:, None]


def _e2m1_table() -> Tensor:
    return torch.tensor(_E2M1, dtype=torch.float32)[:, None]


def _look_up(codes: Tensor, make_table: Callable[[], Tensor]) -> Tensor:
    """Rows of a table (entries, width): (..., width), or (...) for a table with one column."""
    found = nn.functional.embedding(codes.int(), table_on(make_table, codes.device))
    return found[..., 0] if found.shape[-1] == 1 else found


def _read_iq4_nl(blocks_BN: Tensor) -> Scaled:
    return Scaled(_look_up(_fields(blocks_BN, 2, 18, 4, 16), _iq4_table)[:, None], _half(blocks_BN, 0))


def _read_mxfp4(blocks_BN: Tensor) -> Scaled:
    """The scale's byte is an exponent: 2 ** (byte - 128); the two smallest are subnormal."""
    exponents = blocks_BN[:, :1].int()
    bits = torch.where(exponents < 2, torch.bitwise_left_shift(torch.full_like(exponents, 0x200000), exponents), (exponents - 1) << 23)
    return Scaled(_look_up(_fields(blocks_BN, 1, 17, 4, 16), _e2m1_table)[:, None], bits.view(torch.float32)[:, :, None])


def _read_nvfp4(blocks_BN: Tensor) -> Scaled:
    """Four groups of 16, each with a scale in unsigned e4m3, halved. The number with all bits set is no number and counts as zero."""
    bits = blocks_BN[:, :4]
    exponents, mantissas = (bits >> 3 & 15).int(), (bits & 7).float()
    subnormal, normal = mantissas * 2**-9, torch.ldexp(1 + mantissas / 8, exponents - 7)
    scales = torch.where(exponents == 0, subnormal, normal) * 0.5
    scales = torch.where((bits == 0) | (bits == 0x7F), torch.zeros_like(scales), scales)
    codes = _look_up(_fields(blocks_BN, 4, 36, 4, 8), _e2m1_table)
    return Scaled(codes.reshape(-1, 4, 16), scales[:, :, None])


# types with blocks of 256


def _read_q2_k(blocks_BN: Tensor) -> Scaled:
    """16 groups; a byte has a group's scale in the low half and its minimum in the high half."""
    scales, minima = (blocks_BN[:, :16] & 15)[:, :, None], (blocks_BN[:, :16] >> 4)[:, :, None]
    codes = _fields(blocks_BN, 16, 80, 2, 32).reshape(-1, 16, 16)
    return Scaled(codes, _half(blocks_BN, 80) * scales, _half(blocks_BN, 82) * minima)


def _read_q3_k(blocks_BN: Tensor) -> Scaled:
    """Codes have their third bit inverted in 32 bytes of their own; the 16 scales of 6 bits are in 12 bytes."""
    codes = _fields(blocks_BN, 32, 96, 2, 32).add_(_fields(blocks_BN, 0, 32, 1, 32), alpha=4)
    scales = _fields(blocks_BN, 96, 104, 4, 8).add_(_fields(blocks_BN, 104, 108, 2, 4), alpha=16)
    return Scaled(_minus(codes, 4).reshape(-1, 16, 16), _half(blocks_BN, 108) * _minus(scales, 32)[:, :, None])


def _six_bit_pairs(blocks_BN: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits (B, 8, 1) from 12 bytes: of the last four, two bits are on top of the first ones' bytes."""
    low_scales, low_minima, rest = (blocks_BN[:, first + start : first + start + 4] for start in (0, 4, 8))
    scales = torch.cat([low_scales & 63, (rest & 15) | (low_scales >> 2 & 48)], dim=1)
    minima = torch.cat([low_minima & 63, (rest >> 4) | (low_minima >> 2 & 48)], dim=1)
    return scales[:, :, None], minima[:, :, None]


def _read_q4_k(blocks_BN: Tensor) -> Scaled:
    scales, minima = _six_bit_pairs(blocks_BN, 4)
    codes = _fields(blocks_BN, 16, 144, 4, 32).reshape(-1, 8, 32)
    return Scaled(codes, _half(blocks_BN, 0) * scales, _half(blocks_BN, 2) * minima)


def _read_q5_k(blocks_BN: Tensor) -> Scaled:
    scales, minima = _six_bit_pairs(blocks_BN, 4)
    codes = _fields(blocks_BN, 48, 176, 4, 32).add_(_fields(blocks_BN, 16, 48, 1, 32), alpha=16)
    return Scaled(codes.reshape(-1, 8, 32), _half(blocks_BN, 0) * scales, _half(blocks_BN, 2) * minima)


def _read_q6_k(blocks_BN: Tensor) -> Scaled:
    codes = _fields(blocks_BN, 0, 128, 4, 64).add_(_fields(blocks_BN, 128, 192, 2, 32), alpha=16)
    scales = blocks_BN[:, 192:208].view(torch.int8)[:, :, None]
    return Scaled(_minus(codes, 32).reshape(-1, 16, 16), _half(blocks_BN, 208) * scales)


def _trits(blocks_BN: Tensor, first: int, end: int, run: int, digits: int) -> Tensor:
    """Digits -1, 0, 1 of bytes: byte * 3 ** digit, modulo 256, times 3 is in the high byte."""
    bytes_BK = blocks_BN[:, first:end].reshape(-1, run)
    powers = torch.stack([bytes_BK * 3**digit for digit in range(digits)], dim=1)  # uint8 wraps
    return (powers.short() * 3 >> 8).to(torch.int8).sub_(1).reshape(blocks_BN.shape[0], -1)


def _read_tq1_0(blocks_BN: Tensor) -> Scaled:
    codes = torch.cat([_trits(blocks_BN, 0, 32, 32, 5), _trits(blocks_BN, 32, 48, 16, 5), _trits(blocks_BN, 48, 52, 4, 4)], dim=1)
    return Scaled(codes[:, None], _half(blocks_BN, 52))


def _read_tq2_0(blocks_BN: Tensor) -> Scaled:
    return Scaled(_minus(_fields(blocks_BN, 0, 64, 2, 32), 1)[:, None], _half(blocks_BN, 64))


def _read_iq4_xs(blocks_BN: Tensor) -> Scaled:
    """8 groups with scales of 6 bits: four low bits in halves of bytes, two high bits in a 16-bit word."""
    low = _spread(blocks_BN[:, 4:8], 4).transpose(1, 2).reshape(-1, 8)
    high = _spread(blocks_BN[:, 2:4], 2).transpose(1, 2).reshape(-1, 8)
    scales = _minus(low.add(high, alpha=16), 32)[:, :, None]
    codes = _look_up(_fields(blocks_BN, 8, 136, 4, 16), _iq4_table).reshape(-1, 8, 32)
    return Scaled(codes, _half(blocks_BN, 0) * scales)


# types with grids: codes are rows of a table of 8 (or 4) weights, with signs


def _halves_in_order(bytes_BK: Tensor) -> Tensor:
    """Low and high half of each byte, one after the other (B, 2K)."""
    return _spread(bytes_BK, 4).transpose(1, 2).reshape(bytes_BK.shape[0], -1)


def _signs_of_bits(bits_BK: Tensor) -> Tensor:
    """Bytes of 8 signs as +1 and -1 (B, K, 8)."""
    return _spread(bits_BK, 1).transpose(1, 2).float().mul_(-2).add_(1)


def _four_sevens(words_BG: Tensor) -> Tensor:
    """The four indices of 7 bits in a 32-bit word, as signs (B, 4 G, 8)."""
    indices = torch.stack([words_BG >> shift & 127 for shift in (0, 7, 14, 21)], dim=2)
    return _look_up(indices.flatten(1), gguf_grids.even_signs)


def _read_iq2_xxs(blocks_BN: Tensor) -> Scaled:
    words = _words(blocks_BN[:, 2:66], torch.int32).reshape(-1, 8, 2)
    grid = _look_up(blocks_BN[:, 2:66].reshape(-1, 8, 8)[:, :, :4].flatten(1), gguf_grids.iq2_xxs)
    codes = grid * _four_sevens(words[:, :, 1])
    return Scaled(codes.reshape(-1, 8, 32), _half(blocks_BN, 0) * (0.5 + (words[:, :, 1] >> 28).float())[:, :, None] * 0.25)


def _read_iq2_xs(blocks_BN: Tensor) -> Scaled:
    words = _words(blocks_BN[:, 2:66], torch.int16)
    codes = _look_up(words & 511, gguf_grids.iq2_xs) * _look_up(words >> 9, gguf_grids.even_signs)
    scales = (0.5 + _halves_in_order(blocks_BN[:, 66:74]).float())[:, :, None]
    return Scaled(codes.reshape(-1, 16, 16), _half(blocks_BN, 0) * scales * 0.25)


def _read_iq2_s(blocks_BN: Tensor) -> Scaled:
    high = _spread(blocks_BN[:, 66:74], 2).transpose(1, 2).flatten(1)
    codes = _look_up(blocks_BN[:, 2:34].int() + high.int() * 256, gguf_grids.iq2_s) * _signs_of_bits(blocks_BN[:, 34:66])
    scales = (0.5 + _halves_in_order(blocks_BN[:, 74:82]).float())[:, :, None]
    return Scaled(codes.reshape(-1, 16, 16), _half(blocks_BN, 0) * scales * 0.25)


def _read_iq3_xxs(blocks_BN: Tensor) -> Scaled:
    words = _words(blocks_BN[:, 66:98], torch.int32)
    codes = _look_up(blocks_BN[:, 2:66], gguf_grids.iq3_xxs).reshape(-1, 32, 8) * _four_sevens(words)
    return Scaled(codes.reshape(-1, 8, 32), _half(blocks_BN, 0) * (0.5 + (words >> 28).float())[:, :, None] * 0.5)


def _read_iq3_s(blocks_BN: Tensor) -> Scaled:
    high = _spread(blocks_BN[:, 66:74], 1).transpose(1, 2).flatten(1)
    grid = _look_up(blocks_BN[:, 2:66].int() + high.int() * 256, gguf_grids.iq3_s)
    codes = grid.reshape(-1, 32, 8) * _signs_of_bits(blocks_BN[:, 74:106])
    scales = (1 + 2 * _halves_in_order(blocks_BN[:, 106:110]))[:, :, None]
    return Scaled(codes.reshape(-1, 8, 32), _half(blocks_BN, 0) * scales)


_IQ1_DELTA = 0.125


def _read_iq1_s(blocks_BN: Tensor) -> Scaled:
    """Codes are -1, 0, 1, all moved by an eighth up or down."""
    words = _words(blocks_BN[:, 34:50], torch.int16)
    high = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], dim=2).flatten(1)
    grid = _look_up(blocks_BN[:, 2:34].int() + high * 256, gguf_grids.iq1).reshape(-1, 8, 32)
    delta = torch.where(words & 0x8000 == 0, _IQ1_DELTA, -_IQ1_DELTA)[:, :, None]
    return Scaled(grid + delta, _half(blocks_BN, 0) * (2 * (words >> 12 & 7) + 1)[:, :, None])


def _read_iq1_m(blocks_BN: Tensor) -> Scaled:
    """The block's fp16 scale is in the top four bits of four 16-bit words; their other bits are the groups' scales of 3 bits."""
    words = _words(blocks_BN[:, 48:56], torch.int16)
    tops = words >> 12
    bits = tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12
    scale = bits.to(torch.int16).view(torch.float16).float()[:, None, None]
    scales = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], dim=2).reshape(-1, 16, 1)
    high = _halves_in_order(blocks_BN[:, 32:48])
    grid = _look_up(blocks_BN[:, :32].int() + (high & 7).int() * 256, gguf_grids.iq1).reshape(-1, 16, 2, 8)
    delta = torch.where(high & 8 == 0, _IQ1_DELTA, -_IQ1_DELTA).reshape(-1, 16, 2, 1)
    return Scaled((grid + delta).reshape(-1, 16, 16), scale * (2 * scales + 1))


# quantizing


def _as_half_bytes(number_B1: Tensor) -> Tensor:
    return number_B1.to(torch.float16).contiguous().view(torch.uint8)


def _reciprocal(number: Tensor) -> Tensor:
    return torch.where(number == 0, torch.zeros_like(number), 1 / number)


def _join_halves(codes_BK: Tensor) -> Tensor:
    """The first half of the codes in the low bits, the second in the high bits."""
    low, high = codes_BK.chunk(2, dim=1)
    return (low & 15) | (high << 4)


def _join_fifth_bits(codes_BK: Tensor) -> Tensor:
    bits = (codes_BK >> 4).reshape(-1, 4, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits * powers).sum(dim=2, dtype=torch.uint8)


def _around_zero(value_BK: Tensor, half_range: int) -> tuple[Tensor, Tensor]:
    """(scale, codes): the number of largest magnitude gets code 0, zero gets `half_range`."""
    largest = value_BK.gather(1, value_BK.abs().argmax(dim=1, keepdim=True))
    scale = largest / -half_range
    return scale, (value_BK * _reciprocal(scale) + (half_range + 0.5)).trunc().clamp(0, 2 * half_range - 1).to(torch.uint8)


def _from_minimum(value_BK: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, minimum, codes)."""
    least = value_BK.amin(dim=1, keepdim=True)
    scale = (value_BK.amax(dim=1, keepdim=True) - least) / steps
    return scale, least, ((value_BK - least) * _reciprocal(scale) + 0.5).trunc().clamp(0, steps).to(torch.uint8)


def _write_q8_0(value_BK: Tensor) -> Tensor:
    scale = value_BK.abs().amax(dim=1, keepdim=True) / 127
    scaled = value_BK * _reciprocal(scale)
    codes = torch.copysign((scaled.abs() + 0.5).floor(), scaled).to(torch.int8)  # halves away from zero
    return torch.cat([_as_half_bytes(scale), codes.view(torch.uint8)], dim=1)


def _write_q4_0(value_BK: Tensor) -> Tensor:
    scale, codes = _around_zero(value_BK, 8)
    return torch.cat([_as_half_bytes(scale), _join_halves(codes)], dim=1)


def _write_q5_0(value_BK: Tensor) -> Tensor:
    scale, codes = _around_zero(value_BK, 16)
    return torch.cat([_as_half_bytes(scale), _join_fifth_bits(codes), _join_halves(codes)], dim=1)


def _write_q4_1(value_BK: Tensor) -> Tensor:
    scale, least, codes = _from_minimum(value_BK, 15)
    return torch.cat([_as_half_bytes(scale), _as_half_bytes(least), _join_halves(codes)], dim=1)


def _write_q5_1(value_BK: Tensor) -> Tensor:
    scale, least, codes = _from_minimum(value_BK, 31)
    return torch.cat([_as_half_bytes(scale), _as_half_bytes(least), _join_fifth_bits(codes), _join_halves(codes)], dim=1)


BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18, _read_q4_0, _write_q4_0),
    "Q4_1": BlockType(3, 32, 20, _read_q4_1, _write_q4_1),
    "Q5_0": BlockType(6, 32, 22, _read_q5_0, _write_q5_0),
    "Q5_1": BlockType(7, 32, 24, _read_q5_1, _write_q5_1),
    "Q8_0": BlockType(8, 32, 34, _read_q8_0, _write_q8_0),
    "Q2_K": BlockType(10, 256, 84, _read_q2_k),
    "Q3_K": BlockType(11, 256, 110, _read_q3_k),
    "Q4_K": BlockType(12, 256, 144, _read_q4_k),
    "Q5_K": BlockType(13, 256, 176, _read_q5_k),
    "Q6_K": BlockType(14, 256, 210, _read_q6_k),
    "IQ2_XXS": BlockType(16, 256, 66, _read_iq2_xxs),
    "IQ2_XS": BlockType(17, 256, 74, _read_iq2_xs),
    "IQ3_XXS": BlockType(18, 256, 98, _read_iq3_xxs),
    "IQ1_S": BlockType(19, 256, 50, _read_iq1_s),
    "IQ4_NL": BlockType(20, 32, 18, _read_iq4_nl),
    "IQ3_S": BlockType(21, 256, 110, _read_iq3_s),
    "IQ2_S": BlockType(22, 256, 82, _read_iq2_s),
    "IQ4_XS": BlockType(23, 256, 136, _read_iq4_xs),
    "IQ1_M": BlockType(29, 256, 56, _read_iq1_m),
    "TQ1_0": BlockType(34, 256, 54, _read_tq1_0),
    "TQ2_0": BlockType(35, 256, 66, _read_tq2_0),
    "MXFP4": BlockType(39, 32, 17, _read_mxfp4),
    "NVFP4": BlockType(40, 64, 36, _read_nvfp4),
}
TYPE_NAMES = {kind.number: name for name, kind in BLOCK_TYPES.items()}
