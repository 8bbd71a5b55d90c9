"""How the converter writes one tensor: its type or format in the target, and the tensors that a file has for a packed weight."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backend.checkpoint_file import TensorFile
from backend.checkpoint_lora import WeightChange
from backend.storage.block_scaled import BlockScaledFormat, order_scales
from backend.storage.choices import FORMATS, format_for
from backend.storage.four_bit import TABLES, FourBitFormat
from backend.storage.gguf import GgufFormat
from backend.storage.packed import PackedFormat, PackedTensor
from backend.storage.scaled import ScaledFormat
from backend.tensor_writer import GGUF_TYPES, Written

PLAIN_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
KEEP = "keep"
GGUF_SUFFIX = ".gguf"
_PARTS_IN_ONE = ("denoiser", "text")
"""What is quantized in a whole file: a VAE is small, and suffers."""
_LEAST_NUMBERS = 4096
"""Smaller matrices stay in half precision."""
_STATE_BYTES = 512
_COMFY_NAMES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise"}


class ConversionError(ValueError):
    """The conversion is not possible; the message says why and what to do."""


def is_gguf_type(name: str) -> bool:
    return name in FORMATS and isinstance(FORMATS[name]((256, 256)), GgufFormat)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a source: its name in the target, and the part it belongs to ("" for none)."""

    name: str
    key: str
    file: TensorFile
    part: str

    @property
    def path(self) -> Path:
        return self.file.path


class Output:
    """How one tensor of a source is written: as one tensor, or as numbers with their scales. A packed weight that is kept is copied byte for byte.

    Raises: ConversionError if the target's kind of file cannot have it.
    """

    def __init__(self, entry: Entry, to: str, merger: WeightChange, *, to_gguf: bool) -> None:
        self._entry, self._merger = entry, merger
        self._info = entry.file.infos[entry.key]
        self._is_changed = merger.changes(entry.file, entry.key)
        self._is_kept = to == KEEP and self._info.packed is not None
        self._format = self._info.packed if self._is_kept else self._packed_format(to) if to in FORMATS else None
        self._dtype = self._plain_dtype(to)
        self._made: dict[str, Tensor] = {}
        self._check(to_gguf)

    def _check(self, to_gguf: bool) -> None:
        where = f"{self._entry.path.name}: {self._entry.key[:200]}"
        if self._is_kept and isinstance(self._format, GgufFormat) != to_gguf and self._format is not None:
            kind = GGUF_SUFFIX if to_gguf else ".safetensors"
            raise ConversionError(f"{where} is stored in {self._format.title}, which a {kind} file cannot have. Choose another type with --to.")
        if self._format is not None and self._is_kept and self._is_changed and not self._format.can_quantize:
            raise ConversionError(
                f"{where} is stored in {self._format.title}, which cannot be written again once it is changed. Choose another type with --to."
            )
        if to_gguf and self._format is None and self._dtype not in GGUF_TYPES:
            raise ConversionError(
                f"{where} is stored as {str(self._dtype).removeprefix('torch.')}, which a GGUF file does not have. Take the denoiser alone "
                "(--part denoiser), or choose another type with --to."
            )

    def _packed_format(self, to: str) -> PackedFormat | None:
        shape = self._info.shape
        is_weight = self._entry.key.endswith(".weight") and math.prod(shape) >= _LEAST_NUMBERS and "embed" not in self._entry.key
        is_quantized = self._entry.part in _PARTS_IN_ONE or not self._entry.part
        return format_for(to, shape) if is_weight and is_quantized and "shared" not in self._entry.key else None

    def _plain_dtype(self, to: str) -> torch.dtype:
        """The type of a tensor that stays plain: whole numbers as they are, small tensors never in eight bits, those of GGUF files in fp32."""
        stored, is_small, is_packed = self._info.dtype, len(self._info.shape) < 2, self._info.packed is not None
        if not is_packed and (to == KEEP or not stored.is_floating_point):
            return stored
        if to in PLAIN_TYPES:
            return torch.float16 if to == "fp8" and (is_small or self._entry.part == "vae") else PLAIN_TYPES[to]
        if is_gguf_type(to) and is_small:
            return torch.float32
        return stored if not is_packed and stored.itemsize == 2 else torch.float16

    def announced(self) -> list[Written]:
        """The tensors, from shapes alone."""
        name, shape = self._entry.name, tuple(self._info.shape)
        if isinstance(self._format, GgufFormat):
            return [Written(name, shape, torch.uint8, self._format.block_type.number, self._format.num_bytes)]
        if self._format is None:
            return [Written(name, shape, self._dtype)]
        parts = parts_of(name, self._format, torch.empty(self._format.num_bytes, dtype=torch.uint8, device="meta"))
        return [Written(key, tuple(part.shape), part.dtype) for key, part in parts.items()]

    def numbers(self, name: str) -> Tensor:
        """One of the announced tensors. They are asked for in their order, so that the weight is read once."""
        if name not in self._made:
            self._made = self._copied() if self._is_kept and not self._is_changed else self._stored(self._value())
        return self._made.pop(name)

    def _value(self) -> Tensor:
        file, key = self._entry.file, self._entry.key
        if not self._is_changed:
            return file.read(key, dtype=torch.float32 if self._format is not None else self._dtype)
        return self._merger.merge(file, key, file.read(key, dtype=torch.float32))

    def _copied(self) -> dict[str, Tensor]:
        packed = self._entry.file.read_stored(self._entry.key)
        assert isinstance(packed, PackedTensor)
        return self._named(packed.format, packed.buffer)

    def _stored(self, value: Tensor) -> dict[str, Tensor]:
        if self._format is None:
            return {self._entry.name: value.to(self._dtype)}
        return self._named(self._format, self._format.quantize(value, seed=0))

    def _named(self, form: PackedFormat, buffer: Tensor) -> dict[str, Tensor]:
        return {self._entry.name: buffer} if isinstance(form, GgufFormat) else parts_of(self._entry.name, form, buffer)


# what safetensors files have for a packed weight, as `quantized_file` reads it


def parts_of(name: str, form: PackedFormat, buffer: Tensor) -> dict[str, Tensor]:
    """The tensors of a weight by name, as views of its buffer where they are. On the meta device they have only shapes."""
    layer = name.removesuffix(".weight")
    if isinstance(form, ScaledFormat):
        return _scaled_parts(name, layer, form, buffer)
    if isinstance(form, BlockScaledFormat):
        scales, blocks, codes = form.parts(buffer)
        numbers = codes.view(torch.float8_e4m3fn) if form.kind == "mxfp8" else codes
        ordered = order_scales(blocks)
        made = {
            name: numbers.reshape(form.shape[0], -1),
            f"{name}_scale": ordered.view(torch.float8_e8m0fnu if form.kind == "mxfp8" else torch.float8_e4m3fn),
            f"{layer}.comfy_quant": _text({"format": form.kind}, buffer.device),
        }
        return {**made, f"{name}_scale_2": scales.reshape(())} if form.kind == "nvfp4" else made
    assert isinstance(form, FourBitFormat)
    return _four_bit_parts(name, form, buffer)


def _scaled_parts(name: str, layer: str, form: ScaledFormat, buffer: Tensor) -> dict[str, Tensor]:
    scales, numbers = form.parts(buffer)
    numbers = numbers.reshape(form.shape)
    if form.num_scales == 1 and form.dtype != torch.int8:
        return {name: numbers, f"{layer}.scale_weight": scales.reshape(())}
    described: dict[str, object] = {"format": _COMFY_NAMES[form.dtype]}
    if form.group:
        described |= {"convrot": True, "convrot_groupsize": form.group}
    scales = scales.reshape(()) if form.num_scales == 1 else scales
    return {name: numbers, f"{layer}.weight_scale": scales, f"{layer}.comfy_quant": _text(described, buffer.device)}


def _four_bit_parts(name: str, form: FourBitFormat, buffer: Tensor) -> dict[str, Tensor]:
    state: dict[str, object] = {"quant_type": form.kind, "blocksize": form.block, "dtype": "bfloat16", "shape": list(form.shape)}
    made = {f"{name}.quant_map": torch.tensor(TABLES[form.kind], device=buffer.device)}
    if form.nested_block:
        table, scales, offset, indices, codes = form.nested_parts(buffer)
        state |= {"nested_blocksize": form.nested_block, "nested_dtype": "float32", "nested_offset": 0.0 if offset.is_meta else float(offset)}
        made |= {f"{name}.absmax": indices, f"{name}.nested_absmax": scales, f"{name}.nested_quant_map": table}
    else:
        made[f"{name}.absmax"], codes = form.parts(buffer)
    text = json.dumps(state).encode().ljust(_STATE_BYTES)  # as long from shapes alone as with the offset
    made[f"{name}.quant_state.bitsandbytes__{form.kind}"] = torch.tensor(list(text), dtype=torch.uint8, device=buffer.device)
    return {name: codes.reshape(-1, 1), **made}


def _text(described: Mapping[str, object], device: torch.device) -> Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8, device=device)
