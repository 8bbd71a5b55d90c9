"""Weights stored in eight bits without a scale (e4m3fn, e5m2) and cast to the computation type while a layer runs.

Patched weights are rounded at random to one of the two neighbors, which preserves the mean: rounding to nearest would drop nearly every small
change. The noise is drawn on the host from a seed, so that every copy of a network gets the same weights.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from backend.storage.base import Storage
from backend.storage.tables import table_on

MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


class Fp8Storage(Storage):
    """fp8 without a scale."""

    __slots__ = ()

    @classmethod
    def holds(cls, tensor: Tensor) -> bool:
        return tensor.dtype in MANTISSA_BITS

    def dequantize(self, out_dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        return self.tensor.detach().to(out_dtype, copy=copy)

    def run_dtype(self, computation_dtype: torch.dtype) -> torch.dtype:
        return computation_dtype

    def requantize(self, value: Tensor, *, seed: int) -> Fp8Storage:
        return Fp8Storage(round_at_random(value, self.tensor.dtype, seed=seed))


_WITHOUT_FP8 = frozenset({"mps"})
"""Types of devices that have no fp8 tensors: bytes are looked up in a table there."""


def read_fp8(numbers: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """Bytes (uint8) of fp8 numbers as numbers in `out_dtype`, which every half type and fp32 hold exactly."""
    if numbers.device.type == "cpu" and dtype == torch.float8_e4m3fn and out_dtype == torch.float32 and numbers.device.type not in _WITHOUT_FP8:
        return _shift_e4m3(numbers)
    if numbers.device.type not in _WITHOUT_FP8:
        return numbers.view(dtype).to(out_dtype)
    table = table_on(_TABLES[dtype], numbers.device).to(out_dtype)
    return nn.functional.embedding(numbers.int(), table)[..., 0]


def _shift_e4m3(numbers: Tensor) -> Tensor:
    """e4m3 in fp32 by moving bits to their places, five times as fast as torch's cast on a CPU. Not for NaN, which becomes 480."""
    moved = (numbers.view(torch.int8).int() << _MANTISSA_SHIFT).bitwise_and_(_SIGN_AND_NUMBER)
    return moved.view(torch.float32).mul_(2.0**_BIAS_DIFFERENCE)


_MANTISSA_SHIFT, _BIAS_DIFFERENCE = 23 - 3, 127 - 7
_SIGN_AND_NUMBER = 0x07F00000 - 2**31
"""Sign bit, and seven bits behind the four that sign extension fills."""


def _table(dtype: torch.dtype) -> Tensor:
    """The number of every byte (256, 1), fp32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()[:, None]


_TABLES = {dtype: partial(_table, dtype) for dtype in MANTISSA_BITS}


def round_at_random(value: Tensor, dtype: torch.dtype, *, seed: int) -> Tensor:
    """fp32 values in an fp8 type: each becomes one of its two neighbors, drawn so that the mean is preserved.

    Stochastic rounding as in Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.
    """
    facts = torch.finfo(dtype)
    _, exponents = torch.frexp(value)  # value = mantissa * 2 ** exponent with 0.5 <= mantissa < 1
    least_exponent = int(torch.frexp(torch.tensor(facts.smallest_normal)).exponent)
    steps = torch.ldexp(torch.ones_like(value), exponents.clamp(min=least_exponent) - 1 - MANTISSA_BITS[dtype])
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.device)
    floor = torch.floor(value / steps + noise) * steps
    return floor.clamp(facts.min, facts.max).to(dtype)
