"""Weights in low bits: a step of a whole transformer, against plain weights, diffusers' GGUF layers and bitsandbytes' layers on the same weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from backend.storage.choices import FORMATS, format_for, quantize_as
from backend.storage.four_bit import FourBitFormat
from backend.storage.gguf import GgufFormat
from backend.storage.kinds import stored_bytes
from backend.storage.packed import PackedTensor
from backend.storage.running import set_types
from tools.measure import Bench, Metrics, Variant

CONFIG: dict[str, Any] = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 8, "joint_attention_dim": 1024,
    "pooled_projection_dim": 256, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
PICTURE_TOKENS, TEXT_TOKENS = 256, 64
OURS = ("fp8_scaled", "int8", "int8_convrot", "mxfp8", "nvfp4", "nf4", "fp4", "q8_0", "q5_0", "q4_0", "q6_k", "q4_k", "q2_k", "iq4_xs")
IN_DIFFUSERS = ("q8_0", "q5_0", "q4_0", "q6_k", "q4_k", "q2_k", "iq4_xs")
IN_BITSANDBYTES = ("nf4", "fp4")


def _make_network() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(**CONFIG).eval().requires_grad_(False)


def _pack(weight: Tensor, name: str) -> PackedTensor | None:
    """Quantized, or, for a type without a quantizer, random blocks with small scales."""
    form = format_for(name, tuple(weight.shape))
    if form is None or form.can_quantize:
        return quantize_as(name, weight)
    assert isinstance(form, GgufFormat)
    generator = torch.Generator().manual_seed(weight.numel())
    blocks = torch.randint(256, (form.num_bytes // form.block_type.num_bytes, form.block_type.num_bytes), dtype=torch.uint8, generator=generator)
    for place in {"q2_k": (80, 82), "q4_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,)}[name]:
        blocks[:, place : place + 2] = torch.full((len(blocks), 1), 1e-4, dtype=torch.float16).view(torch.uint8)
    return PackedTensor(blocks.flatten(), form)


def _replace_linears(network: nn.Module, make: Callable[[nn.Linear], nn.Linear | None]) -> None:
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and (made := make(layer)) is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, made)


def _ours(network: Any, name: str) -> Any:
    made = copy.deepcopy(network)
    for layer in made.modules():
        if isinstance(layer, nn.Linear) and (packed := _pack(layer.weight, name)) is not None:
            layer.weight = nn.Parameter(packed, requires_grad=False)
    set_types(made, torch.float32, torch.float32)
    return made


def _diffusers(ours: Any) -> Any:
    """The same blocks in diffusers' layers."""

    def make(layer: nn.Linear) -> nn.Linear | None:
        weight: Any = layer.weight
        if not isinstance(weight, PackedTensor) or not isinstance(weight.format, GgufFormat):
            return None
        made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, device="meta")
        blocks = weight.buffer.reshape(layer.out_features, -1)
        made.weight = GGUFParameter(blocks, quant_type=GGMLQuantizationType[weight.format.kind])
        made.bias = layer.bias
        return made

    made = copy.deepcopy(ours)
    _replace_linears(made, make)
    return made


def _bitsandbytes(ours: Any) -> Any:
    """The same bytes in bitsandbytes' layers."""
    import bitsandbytes

    def make(layer: nn.Linear) -> nn.Linear | None:
        weight: Any = layer.weight
        if not isinstance(weight, PackedTensor) or not isinstance(weight.format, FourBitFormat):
            return None
        absmax, codes = weight.format.parts(weight.buffer)
        state = bitsandbytes.functional.QuantState(
            absmax=absmax, shape=torch.Size(weight.shape), code=bitsandbytes.functional.get_4bit_type(weight.format.kind, device="cpu"),
            blocksize=weight.format.block, quant_type=weight.format.kind, dtype=torch.float32,
        )  # fmt: skip
        made = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type=weight.format.kind
        )
        made.weight = bitsandbytes.nn.Params4bit(codes.reshape(-1, 1), requires_grad=False, quant_state=state, bnb_quantized=True)
        made.weight.module = made
        made.quant_state, made.bias = state, layer.bias
        return made  # type: ignore[no-any-return]

    made = copy.deepcopy(ours)
    _replace_linears(made, make)
    return made


def _step(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, PICTURE_TOKENS, 64, generator=generator)
    text = torch.randn(1, TEXT_TOKENS, CONFIG["joint_attention_dim"], generator=generator)
    pooled = torch.randn(1, CONFIG["pooled_projection_dim"], generator=generator)
    places = torch.zeros(PICTURE_TOKENS, 3), torch.zeros(TEXT_TOKENS, 3)
    with torch.inference_mode():
        (flow,) = network(tokens, text, pooled, torch.tensor([0.5]), *places, torch.tensor([3.5]), return_dict=False)
    return flow  # type: ignore[no-any-return]


def _run(network: Any, like: Tensor | None) -> Metrics:
    flow = _step(network)
    if like is None:
        return {}
    return {"distance from ours": float(torch.linalg.vector_norm(flow - like) / torch.linalg.vector_norm(like))}


def _make_variants() -> Mapping[str, Variant]:
    plain = _make_network()
    variants: dict[str, Variant] = {"plain fp32": partial(_measured, plain)}
    for name in OURS:
        ours = _ours(plain, name)
        title = FORMATS[name]((256, 256)).title
        variants[title] = partial(_measured, ours)
        if name in IN_DIFFUSERS:
            variants[f"{title}, diffusers"] = partial(_run, _diffusers(ours), _step(ours))
        if name in IN_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is not None:
            variants[f"{title}, bitsandbytes"] = partial(_run, _bitsandbytes(ours), _step(ours))
    return variants


def _measured(network: Any) -> Metrics:
    _step(network)
    return {"MB of weights": stored_bytes(network.parameters()) / 1e6}


_BLOCKS = f"{CONFIG['num_layers']} double and {CONFIG['num_single_layers']} single blocks"
_WIDTH = CONFIG["attention_head_dim"] * CONFIG["num_attention_heads"]
BENCH = Bench(
    question=f"What does a step of a Flux.1 transformer {_WIDTH} wide ({_BLOCKS}, "
    f"{PICTURE_TOKENS} picture and {TEXT_TOKENS} text tokens) cost with its matrices in low bits, against plain fp32, and against diffusers' GGUF "
    "layers and bitsandbytes' layers with the same bytes? Types without a quantizer have random blocks.",
    make_variants=_make_variants,
    baseline="plain fp32",
    num_rounds=7,
    packages=("torch", "gguf", "diffusers", *(("bitsandbytes",) if importlib.util.find_spec("bitsandbytes") is not None else ())),
)
