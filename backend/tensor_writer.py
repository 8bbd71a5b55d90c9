"""Writes files of tensors one tensor at a time, so that a model need not fit into memory: the header first, from shapes and types, then the numbers.

Each tensor is written to an open stream; the caller decides whether the file gets its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_ALIGNMENT = 8
GGUF_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""Plain types of GGUF files, by their numbers."""


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor as a file has it. `block_type`: its number of GGUF's block types, whose bytes are the numbers; None for plain numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_type: int | None = None
    num_block_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return self.num_block_bytes if self.block_type is not None else prod(self.shape) * self.dtype.itemsize


NumbersOf = Callable[[Written], Tensor]


def write_safetensors(path: Path, tensors: Sequence[Written], numbers_of: NumbersOf, metadata: Mapping[str, str]) -> None:
    """`numbers_of` is called once per tensor, in order. Raises: OSError."""
    header: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.num_bytes]}
        end += tensor.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(_bytes_of(numbers_of(tensor), tensor))


def write_gguf(path: Path, tensors: Sequence[Written], numbers_of: NumbersOf, architecture: str) -> None:
    """Like `write_safetensors`. Raises: OSError."""
    import gguf  # only for these files
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    for tensor in tensors:
        number = gguf.GGMLQuantizationType(GGUF_TYPES[tensor.dtype] if tensor.block_type is None else tensor.block_type)
        writer.add_tensor_info(tensor.name, tensor.shape or (1,), np.dtype(np.float32), tensor.num_bytes, raw_dtype=number)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.frombuffer(_bytes_of(numbers_of(tensor), tensor), dtype=np.uint8))
    finally:
        writer.close()


def _bytes_of(numbers: Tensor, tensor: Written) -> bytes:
    data = numbers.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if len(data) != tensor.num_bytes:
        raise RuntimeError(f"{tensor.name} has {len(data)} bytes, but {tensor.num_bytes} were announced.")
    return data
