"""The formats that plain weights can be stored in, by the names that users give: the option "Diffusion in Low Bits", the converter, the simulator."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from backend.storage.block_scaled import KINDS as BLOCK_SCALED_KINDS
from backend.storage.block_scaled import BlockScaledFormat
from backend.storage.four_bit import FourBitFormat
from backend.storage.gguf import GgufFormat
from backend.storage.gguf_blocks import BLOCK_TYPES
from backend.storage.packed import PackedFormat, PackedFormatError, PackedTensor, empty_packed
from backend.storage.scaled import ScaledFormat

ROTATED_GROUP = 256
"""Numbers that int8_convrot rotates together."""
MakeFormat = Callable[[tuple[int, ...]], PackedFormat]


def _gguf(kind: str) -> MakeFormat:
    return lambda shape: GgufFormat(shape, kind)


FORMATS: dict[str, MakeFormat] = {
    "fp8_scaled": lambda shape: ScaledFormat(shape, torch.float8_e4m3fn),
    "int8": lambda shape: ScaledFormat(shape, torch.int8, shape[0]),
    "int8_convrot": lambda shape: ScaledFormat(shape, torch.int8, shape[0], ROTATED_GROUP),
    "nf4": lambda shape: FourBitFormat(shape, "nf4"),
    "fp4": lambda shape: FourBitFormat(shape, "fp4"),
    **{kind.lower(): _gguf(kind) for kind in BLOCK_TYPES},
    "mxfp8": lambda shape: BlockScaledFormat(shape, "mxfp8"),
    "nvfp4": lambda shape: BlockScaledFormat(shape, "nvfp4", 1),
}
"""nvfp4 is comfy-kitchen's. GGUF's type of that name has other blocks and no quantizer; it is only read."""


_BLOCKS = {
    "int8_convrot": ROTATED_GROUP,
    **{kind.lower(): block_type.weights for kind, block_type in BLOCK_TYPES.items()},
    **{kind: facts.block for kind, facts in BLOCK_SCALED_KINDS.items()},
}
"""Numbers of a row that a format stores together."""


def bits_per_weight(name: str) -> float:
    """Of a large weight."""
    shape = (4096, 4096)
    return 8 * FORMATS[name](shape).num_bytes / prod(shape)


def format_for(name: str, shape: tuple[int, ...]) -> PackedFormat | None:
    """The format of a matrix of this shape; None if it stays plain: no matrix, or rows that the format's blocks do not divide."""
    return None if len(shape) != 2 or shape[1] % _BLOCKS.get(name, 1) else FORMATS[name](shape)


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
