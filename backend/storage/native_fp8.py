"""Products of fp8 matrices on the tensor cores, for cards that have them: an option, because inputs are rounded to fp8 too.

y[t, o] = s_t w_o sum_i x8[t, i] W8[o, i]: every token's input is divided by its own scale s_t = max |x_t| / 448, so that a token's result does not
depend on the others in its batch, and rows may be dealt to slots as before. w_o is the weight's scale, one or one per row.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backend.storage.base import Storage
from backend.storage.fp8 import Fp8Storage
from backend.storage.packed import PackedStorage
from backend.storage.scaled import ScaledFormat

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SIDE_STEP = 16
"""torch._scaled_mm takes sides that are multiples of this."""


class Fp8Operand(torch.Tensor):
    """An e4m3 weight (O, I) with its scales (1, O), fp32, whose product with an input is computed in fp8. Lives while its layer runs."""

    scales: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear:
            return _multiply(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def operand_of(storage: Storage) -> Fp8Operand | None:
    """The weight as an operand that shares its memory; None if it is not stored in e4m3, or has sides that the product does not take."""
    if isinstance(storage, Fp8Storage):
        numbers, scales = storage.tensor.detach(), torch.ones(1, device=storage.device)
    elif isinstance(storage, PackedStorage) and isinstance(storage.format, ScaledFormat):
        scales, numbers = storage.format.parts(storage.tensor.buffer)
    else:
        return None
    if numbers.dtype != torch.float8_e4m3fn or len(storage.shape) != 2 or any(side % _SIDE_STEP for side in storage.shape):
        return None
    operand = numbers.reshape(storage.shape).as_subclass(Fp8Operand)
    operand.scales = scales.reshape(1, -1).expand(1, storage.shape[0])
    return operand


def _multiply(input: Tensor, weight: Fp8Operand, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear` with an input in any float type; the result has its type."""
    x_TI = input.reshape(-1, input.shape[-1]).float()
    scales_T1 = (x_TI.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=1e-12)
    numbers_TI = (x_TI / scales_T1).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    y_TO = torch._scaled_mm(
        numbers_TI, weight.as_subclass(Tensor).t(), scale_a=scales_T1, scale_b=weight.scales.contiguous(), out_dtype=torch.bfloat16
    ).to(input.dtype)  # fmt: skip
    y_TO = y_TO if bias is None else y_TO + bias
    return y_TO.reshape(*input.shape[:-1], -1)
