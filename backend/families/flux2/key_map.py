"""Maps names of Flux.2's weights between diffusers' transformer (ours) and Black Forest Labs' files (the original).

    transformer_blocks.0.attn.to_q, to_k, to_v               double_blocks.0.img_attn.qkv      rows in equal thirds
    single_transformer_blocks.0.attn.to_qkv_mlp_proj         single_blocks.0.linear1           whole, here and there
    norm_out.linear                                          final_layer.adaLN_modulation.1    halves swapped: shift before scale there

Knows no files and no devices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from backend.families.flux.key_map import DOUBLE_NORMS, IMAGE_QKV, RESPELLED, SINGLE_NORMS, TEXT_QKV, add_norms, share_rows
from backend.families.key_map import KeyMap, Rows

_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}


def flux2_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built Flux2Transformer2DModel of any depth and width, without guidance."""
    flux2: Any = network
    width, modules, lora_names = flux2.inner_dim, dict(_ENDS), {}
    rows = {"norm_out.linear": Rows(0, 2 * width, 2 * width, swapped=True)}
    for number in range(len(flux2.transformer_blocks)):
        ours, original = f"transformer_blocks.{number}", f"double_blocks.{number}"
        modules.update({f"{ours}.{name}": f"{original}.{other}" for name, other in _DOUBLE.items()})
        add_norms(ours, original, DOUBLE_NORMS, modules)
        for names, stream, fused in ((IMAGE_QKV, "img", "attn.to_qkv"), (TEXT_QKV, "txt", "attn.to_added_qkv")):
            parts = share_rows([f"{ours}.{name}" for name in names], [width] * 3)
            rows.update(parts)
            modules.update(dict.fromkeys(parts, f"{original}.{stream}_attn.qkv"))
            lora_names[f"{ours}.{fused}"] = parts
    for number in range(len(flux2.single_transformer_blocks)):
        ours, original = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        modules.update({f"{ours}.{name}": f"{original}.{other}" for name, other in _SINGLE.items()})
        add_norms(ours, original, SINGLE_NORMS, modules)
    return KeyMap(modules=modules, rows=rows, respelled=RESPELLED, lora_names=lora_names)
