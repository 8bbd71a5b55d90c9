"""Weights in low bits: bits and errors against full precision, and what a layer costs with them, against the same layer with a plain weight."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from math import prod

import gguf
import numpy as np
import torch
from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter, dequantize_gguf_tensor
from torch import Tensor, nn

from backend.patcher.base import ModelPatcher
from backend.patcher.lora_math import LoraPatch
from backend.storage.choices import FORMATS, quantize_as
from backend.storage.gguf import GgufFormat
from backend.storage.kinds import storage_of
from backend.storage.packed import PackedTensor
from backend.storage.running import set_types
from tools.measure import Bench, Metrics, Variant

SHAPE, TOKENS, RANK = (1024, 3072), 256, 16
CPU = torch.device("cpu")


def _make_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    set_types(nn.Sequential(layer), weight.dtype if weight.is_floating_point() else torch.float32, torch.float32)
    return layer


def _random_blocks(form: GgufFormat) -> PackedTensor:
    """For a type without a quantizer. Scales are whatever the bytes say."""
    num_bytes = prod(SHAPE) // form.block_type.weights * form.block_type.num_bytes
    return PackedTensor(torch.randint(256, (num_bytes,), dtype=torch.uint8), form)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def _ms(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return (time.perf_counter() - began_s) * 1e3


def _run(layer: nn.Linear, exact: Tensor | None, x: Tensor) -> Metrics:
    storage = storage_of(layer.weight)
    metrics = {"bits": 8 * storage.stored_bytes / prod(SHAPE), "layer s": _ms(lambda: layer(x)) / 1e3}
    metrics["dequantize ms"] = _ms(lambda: storage.dequantize(torch.float32))
    if exact is not None:
        metrics["weight error"] = _relative(storage.dequantize(torch.float32), exact)
        metrics["output error"] = _relative(layer(x), x @ exact.T)
    return metrics | _references(layer.weight)


def _references(weight: Tensor) -> dict[str, float]:
    """Times of the `gguf` package, and of diffusers for the types that it has, for the same blocks."""
    if not isinstance(weight, PackedTensor) or not isinstance(weight.format, GgufFormat):
        return {}
    number, blocks = gguf.GGMLQuantizationType[weight.format.kind], weight.buffer.reshape(SHAPE[0], -1)
    with np.errstate(all="ignore"):
        found = {"gguf package ms": _ms(lambda: gguf.quants.dequantize(blocks.numpy(), number))}
    if number in SUPPORTED_GGUF_QUANT_TYPES:
        parameter = GGUFParameter(blocks, quant_type=number)
        found["diffusers ms"] = _ms(lambda: dequantize_gguf_tensor(parameter))
    return found


def _switch(module: nn.Module, patch: LoraPatch, x: Tensor) -> Metrics:
    """Another strength of a LoRA, and the first output with it."""

    def refresh(strength: float) -> None:
        patcher = ModelPatcher(module, CPU, CPU)
        patcher.add_patches(filename="bench", patches={"0.weight": patch}, strength_patch=strength)
        patcher.refresh_loras()

    refresh(0.5)
    return {"switch ms": _ms(lambda: refresh(0.8)), "layer s": _ms(lambda: module(x)) / 1e3}


def _make_variants() -> Mapping[str, Variant]:
    torch.manual_seed(0)
    exact, x = torch.randn(SHAPE) * 0.02, torch.randn(TOKENS, SHAPE[1])
    variants: dict[str, Variant] = {"plain fp32": partial(_run, _make_layer(exact.clone()), exact, x)}
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        variants[f"{str(dtype).removeprefix('torch.')} without scale"] = partial(_run, _make_layer(exact.to(dtype)), exact, x)
    for name, make in FORMATS.items():
        form = make(SHAPE)
        packed = quantize_as(name, exact) if form.can_quantize else _random_blocks(form) if isinstance(form, GgufFormat) else None
        if packed is not None:
            variants[form.title] = partial(_run, _make_layer(packed), exact if form.can_quantize else None, x)
    packed = quantize_as("q8_0", exact)
    assert packed is not None
    patch = LoraPatch(up=torch.randn(SHAPE[0], RANK) * 0.01, down=torch.randn(RANK, SHAPE[1]) * 0.01)
    variants["GGUF Q8_0, side-branch LoRA"] = partial(_switch, nn.Sequential(_make_layer(packed)), patch, x)
    return variants


BENCH = Bench(
    question=f"What do weights in low bits lose, and what does a layer of {SHAPE[1]} inputs and {SHAPE[0]} outputs cost with them on {TOKENS} "
    "tokens, compared with a plain fp32 weight? Errors are relative Frobenius norms of the weight and of the output; types without a quantizer have "
    "random blocks, and so no error.",
    make_variants=_make_variants,
    baseline="plain fp32",
    num_rounds=5,
    packages=("torch", "gguf", "diffusers"),
    time_metric="layer s",
)
