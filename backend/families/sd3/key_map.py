"""Maps names of SD3's weights between diffusers' transformer (ours) and Stability's files (the original).

    transformer_blocks.0.attn.to_q, to_k, to_v       joint_blocks.0.x_block.attn.qkv                     rows in equal thirds
    transformer_blocks.0.attn2.to_q ..               joint_blocks.0.x_block.attn2.qkv                    the same
    norm_out.linear, the last norm1_context.linear   final_layer.adaLN_modulation.1, context_block's     halves swapped: shift before scale there

Knows no files and no devices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from backend.families.flux.key_map import share_rows
from backend.families.key_map import KeyMap, Rows

ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def sd3_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built SD3Transformer2DModel of any depth and width."""
    sd3: Any = network
    width, there = sd3.inner_dim, dict(sd3.named_modules())
    swapped = Rows(0, 2 * width, 2 * width, swapped=True)
    modules, rows = dict(ENDS), {"norm_out.linear": swapped}
    for number, block in enumerate(sd3.transformer_blocks):
        ours, original = f"transformer_blocks.{number}", f"joint_blocks.{number}"
        modules.update({f"{ours}.{name}": f"{original}.{other}" for name, other in _BLOCK.items() if f"{ours}.{name}" in there})
        for other, names in _FUSED.items():
            if f"{ours}.{names[0]}" in there:
                parts = share_rows([f"{ours}.{name}" for name in names], [width] * 3)
                rows.update(parts)
                modules.update(dict.fromkeys(parts, f"{original}.{other}"))
        if block.context_pre_only:
            rows[f"{ours}.norm1_context.linear"] = swapped
    return KeyMap(modules=modules, rows=rows)
