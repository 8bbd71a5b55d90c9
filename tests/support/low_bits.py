"""Tensors of a model in low bits, as files have them, and the values that a reference reads from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.storage.four_bit import FourBitFormat, quantize_four_bit
from backend.storage.packed import PackedTensor

FP8_MAX = 448.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LowBits:
    """`tensors`: what a safetensors file has; `values`: plain tensors with the numbers it means."""

    tensors: dict[str, Tensor]
    values: dict[str, Tensor]


def is_matrix(key: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and key.endswith(".weight") and "embed" not in key and "shared" not in key


def quantize(tensors: Mapping[str, Tensor], spelling: str, prefix: str = "") -> LowBits:
    """The matrices in one of SPELLINGS, everything else plain."""
    made, values = dict(tensors), dict(tensors)
    for key, tensor in tensors.items():
        if is_matrix(key, tensor):
            del made[key]
            parts, values[key] = _SPELLINGS[spelling](key.removesuffix(".weight"), tensor.float())
            made |= parts
    if spelling == "scaled_fp8":
        made[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return LowBits(tensors=made, values=values)


def _scale_weight(layer: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = value.abs().max() / FP8_MAX
    numbers = (value / scale).to(torch.float8_e4m3fn)
    return {f"{layer}.weight": numbers, f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(())}, numbers.float() * scale


def _comfy_quant(layer: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """e5m2, with a scale per row."""
    scale = value.abs().amax(dim=1, keepdim=True) / 57344.0
    numbers = (value / scale).to(torch.float8_e5m2)
    description = torch.tensor(list(json.dumps({"format": "float8_e5m2"}).encode()), dtype=torch.uint8)
    parts = {f"{layer}.weight": numbers, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": description}
    return parts, numbers.float() * scale


def _int8(layer: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """bitsandbytes' int8: a row's largest magnitude is 127."""
    largest = value.abs().amax(dim=1)
    numbers = (value / largest[:, None] * 127).round().to(torch.int8)
    parts = {f"{layer}.weight": numbers, f"{layer}.SCB": largest, f"{layer}.weight_format": torch.zeros((), dtype=torch.uint8)}
    return parts, numbers.float() * (largest / 127)[:, None]


def _nf4(layer: str, value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    packed = quantize_four_bit(value, "nf4")
    return bitsandbytes_parts(f"{layer}.weight", packed), packed.format.dequantize(packed.buffer, torch.float32)


def bitsandbytes_parts(key: str, packed: PackedTensor) -> dict[str, Tensor]:
    """A weight without double quantization as bitsandbytes writes it."""
    form = packed.format
    assert isinstance(form, FourBitFormat) and not form.nested_block
    state = {"quant_type": form.kind, "blocksize": form.block, "dtype": "bfloat16", "shape": list(form.shape)}
    absmax = form.absmax(packed.buffer)
    return {
        key: packed.buffer[4 * absmax.numel() :].reshape(-1, 1).clone(),
        f"{key}.absmax": absmax.clone(),
        f"{key}.quant_state.bitsandbytes__{form.kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


_SPELLINGS: dict[str, Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]] = {
    "scaled_fp8": _scale_weight,
    "comfy_quant": _comfy_quant,
    "int8": _int8,
    "nf4": _nf4,
}
SPELLINGS = tuple(_SPELLINGS)


def write_low_bits(path: Path, tensors: Mapping[str, Tensor], spelling: str, prefix: str = "") -> dict[str, Tensor]:
    """Write a safetensors file; returns the values that it means."""
    made = quantize(tensors, spelling, prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in made.tensors.items()}, path)
    return made.values


# GGUF


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind: str,
    *,
    architecture: str = "flux",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Write a file with the `gguf` package; returns the values that the package reads from it. Weights whose rows blocks do not divide are fp16.

    `shapes`: the original shapes of tensors that are stored as other ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, values = gguf.GGMLQuantizationType[kind], {}
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(path, architecture)
    for name, text in (metadata or {}).items():
        writer.add_string(name, text)
    for key, tensor in tensors.items():
        array = tensor.float().numpy()
        if array.ndim < 2 or array.shape[-1] % block:
            kept = array if array.ndim < 2 else array.astype(np.float16)
            writer.add_tensor(key, kept)
            values[key] = torch.from_numpy(kept.astype(np.float32))
            continue
        stored = _stored_bytes(array, number, block, block_bytes)
        writer.add_tensor(key, stored, raw_dtype=number)
        values[key] = torch.from_numpy(gguf.quants.dequantize(stored, number))
    for key, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
        values[key] = values[key].reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _stored_bytes(array: np.ndarray, number: gguf.GGMLQuantizationType, block: int, block_bytes: int) -> np.ndarray:
    """The package's own bytes, or random ones with small scales where it has no quantizer."""
    try:
        return gguf.quants.quantize(array, number)
    except NotImplementedError:
        generator = np.random.default_rng(prod(array.shape))
        stored = generator.integers(0, 256, (array.size // block, block_bytes), dtype=np.uint8)
        for place in _HALVES[number.name]:
            stored[:, place : place + 2] = (generator.random((len(stored), 1)) * 0.002).astype(np.float16).view(np.uint8)
        return stored.reshape(*array.shape[:-1], -1)


_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}
"""Where blocks have their fp16 scales."""
