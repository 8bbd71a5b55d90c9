"""Maps names of Krea 2's weights between diffusers' transformer (ours) and the original files.

    img_in, time_embed.linear_1, time_mod_proj                first, tmlp.0, tproj.1
    transformer_blocks.0.attn.to_q, to_gate, norm_q           blocks.0.attn.wq, gate, qknorm.qnorm           (norms have a "scale")
    transformer_blocks.0.norm1, ff, scale_shift_table         blocks.0.prenorm, mlp, mod.lin                 (the table without rows)
    text_fusion.layerwise_blocks.0, txt_in                    txtfusion.layerwise_blocks.0, txtmlp

Knows no files and no devices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from backend.families.key_map import KeyMap

_ENDS = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.norm.weight": "txtmlp.0.scale",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.linear": "last.linear",
    "final_layer.norm.weight": "last.norm.scale",
    "final_layer.scale_shift_table": "last.modulation.lin",
}
_BLOCK = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate",
    "attn.norm_q.weight": "attn.qknorm.qnorm.scale",
    "attn.norm_k.weight": "attn.qknorm.knorm.scale",
    "ff": "mlp",
    "norm1.weight": "prenorm.scale",
    "norm2.weight": "postnorm.scale",
}
TABLE = "scale_shift_table"


def krea2_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built Krea2Transformer2DModel of any depth and width."""
    krea: Any = network
    modules = dict(_ENDS)
    for ours, original, count in (
        ("transformer_blocks", "blocks", len(krea.transformer_blocks)),
        ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks", len(krea.text_fusion.layerwise_blocks)),
        ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks", len(krea.text_fusion.refiner_blocks)),
    ):
        for number in range(count):
            modules.update({f"{ours}.{number}.{name}": f"{original}.{number}.{other}" for name, other in _BLOCK.items()})
    modules.update({f"transformer_blocks.{number}.{TABLE}": f"blocks.{number}.mod.lin" for number in range(len(krea.transformer_blocks))})
    return KeyMap(modules=modules)
