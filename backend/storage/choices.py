"""The formats that plain weights can be stored in, by the names that users give: the option "Diffusion in Low Bits", the converter, the simulator."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from backend.storage.four_bit import FourBitFormat
from backend.storage.gguf import GgufFormat
from backend.storage.gguf_blocks import BLOCK_TYPES
from backend.storage.packed import PackedFormat, PackedFormatError, PackedTensor, empty_packed
from backend.storage.scaled import ScaledFormat

MakeFormat = Callable[[tuple[int, ...]], PackedFormat]


def _gguf(kind: str) -> MakeFormat:
    return lambda shape: GgufFormat(shape, kind)


FORMATS: dict[str, MakeFormat] = {
    "fp8_scaled": lambda shape: ScaledFormat(shape, torch.float8_e4m3fn),
    "int8": lambda shape: ScaledFormat(shape, torch.int8, shape[0]),
    "nf4": lambda shape: FourBitFormat(shape, "nf4"),
    "fp4": lambda shape: FourBitFormat(shape, "fp4"),
    **{kind.lower(): _gguf(kind) for kind in BLOCK_TYPES},
}


def bits_per_weight(name: str) -> float:
    """Of a large weight."""
    shape = (4096, 4096)
    return 8 * FORMATS[name](shape).num_bytes / prod(shape)


def format_for(name: str, shape: tuple[int, ...]) -> PackedFormat | None:
    """The format of a matrix of this shape; None if it stays plain: no matrix, or rows that the format's blocks do not divide."""
    if len(shape) != 2:
        return None
    form = FORMATS[name](shape)
    block = BLOCK_TYPES[form.kind].weights if isinstance(form, GgufFormat) else 1
    return None if shape[1] % block else form


def quantize_as(name: str, value: Tensor, *, seed: int = 0) -> PackedTensor | None:
    """A plain matrix in this format; None if it stays plain. Raises: PackedFormatError for a format without a quantizer."""
    form = format_for(name, tuple(value.shape))
    return None if form is None else PackedTensor(form.quantize(value, seed=seed), form)


def pack_empty(module: nn.Module, name: str) -> None:
    """Give the linear layers of a network without memory this format, so that its bytes count."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and (form := format_for(name, tuple(layer.weight.shape))) is not None:
            layer.weight = nn.Parameter(empty_packed(form), requires_grad=False)


def check_can_quantize(name: str) -> None:
    """Raises: PackedFormatError if plain weights cannot be converted to this format."""
    form = FORMATS[name]((256, 256))
    if not form.can_quantize:
        can = ", ".join(other for other, make in FORMATS.items() if make((256, 256)).can_quantize)
        raise PackedFormatError(f"There is no quantizer for {form.title}. Use one of {can}.")
