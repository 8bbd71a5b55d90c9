"""Maps names of Flux.1's weights between diffusers' transformer (ours) and Black Forest Labs' files (the original).

    transformer_blocks.0.attn.to_q, to_k, to_v               double_blocks.0.img_attn.qkv      rows in equal thirds
    single_transformer_blocks.0.attn.to_q .. proj_mlp        single_blocks.0.linear1           q, k, v, then the MLP's
    norm_out.linear                                          final_layer.adaLN_modulation.1    halves swapped: shift before scale there

Knows no files and no devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from backend.families.key_map import KeyMap, Rows

_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
RESPELLED = {"_norm.scale": "_norm.weight"}


def flux_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built FluxTransformer2DModel of any depth and width."""
    flux: Any = network
    width, mlp_width = flux.x_embedder.out_features, flux.single_transformer_blocks[0].proj_mlp.out_features if flux.single_transformer_blocks else 0
    modules = {name: original for name, original in _ENDS.items() if _has(network, name)}
    rows = {"norm_out.linear": Rows(0, 2 * width, 2 * width, swapped=True)} if _has(network, "norm_out.linear") else {}
    lora_names: dict[str, dict[str, Rows]] = {}
    for number in range(len(flux.transformer_blocks)):
        _add_double(number, width, modules, rows, lora_names)
    for number in range(len(flux.single_transformer_blocks)):
        _add_single(number, width, mlp_width, modules, rows, lora_names)
    modules = {name: original for name, original in modules.items() if _has(network, name.removesuffix(".weight"))}
    return KeyMap(modules=modules, rows=rows, respelled=RESPELLED, lora_names=lora_names)


def _add_double(number: int, width: int, modules: dict[str, str], rows: dict[str, Rows], lora_names: dict[str, dict[str, Rows]]) -> None:
    ours, original = f"transformer_blocks.{number}", f"double_blocks.{number}"
    modules.update({f"{ours}.{name}": f"{original}.{other}" for name, other in _DOUBLE.items()})
    add_norms(ours, original, DOUBLE_NORMS, modules)
    for names, stream, number_in_xlabs, fused in ((IMAGE_QKV, "img", 1, "attn.to_qkv"), (TEXT_QKV, "txt", 2, "attn.to_added_qkv")):
        parts = share_rows([f"{ours}.{name}" for name in names], [width] * 3)
        rows.update(parts)
        modules.update(dict.fromkeys(parts, f"{original}.{stream}_attn.qkv"))
        lora_names[f"{ours}.{fused}"] = lora_names[f"{original}.processor.qkv_lora{number_in_xlabs}"] = parts
    for number_in_xlabs, name in ((1, "attn.to_out.0"), (2, "attn.to_add_out")):
        lora_names[f"{original}.processor.proj_lora{number_in_xlabs}"] = {f"{ours}.{name}": Rows(0, width, width)}


def _add_single(
    number: int, width: int, mlp_width: int, modules: dict[str, str], rows: dict[str, Rows], lora_names: dict[str, dict[str, Rows]]
) -> None:
    ours, original = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
    modules.update({f"{ours}.{name}": f"{original}.{other}" for name, other in _SINGLE.items()})
    add_norms(ours, original, SINGLE_NORMS, modules)
    parts = share_rows([f"{ours}.{name}" for name in (*IMAGE_QKV, "proj_mlp")], [width] * 3 + [mlp_width])
    rows.update(parts)
    modules.update(dict.fromkeys(parts, f"{original}.linear1"))
    attention = share_rows([f"{ours}.{name}" for name in IMAGE_QKV], [width] * 3)
    lora_names[f"{ours}.attn.to_qkv"] = lora_names[f"{original}.processor.qkv"] = attention  # XLabs: "processor.qkv" + "_lora.up.weight"
    lora_names[f"{original}.processor.proj"] = {f"{ours}.proj_out": Rows(0, width, width)}


def add_norms(ours: str, original: str, names: Mapping[str, str], modules: dict[str, str]) -> None:
    """Add norm layers, whose weights are called scales in the original."""
    for name, other in names.items():
        modules[f"{ours}.{name}"] = f"{original}.{other}"
        modules[f"{ours}.{name}.weight"] = f"{original}.{other}.scale"


def share_rows(names: Sequence[str], lengths: Sequence[int]) -> dict[str, Rows]:
    """Rows of modules that are stacked in one matrix, in order."""
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return {name: Rows(end - length, end, ends[-1]) for name, length, end in zip(names, lengths, ends, strict=True)}


def _has(network: nn.Module, name: str) -> bool:
    """Whether the network has this module. One without guidance has no embedder for it."""
    try:
        network.get_submodule(name)
    except AttributeError:
        return False
    return True
