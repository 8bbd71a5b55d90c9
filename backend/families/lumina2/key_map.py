"""Maps names of Lumina2's weights between diffusers' transformer (ours) and the original files.

    layers.0.attn.to_q, to_k, to_v            layers.0.attention.qkv              rows: queries, then fewer keys and values
    layers.0.norm1.linear, norm1.norm         layers.0.adaLN_modulation.1, attention_norm1
    norm_out.linear_1, linear_2               final_layer.adaLN_modulation.1, linear

Knows no files and no devices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from backend.families.flux.key_map import share_rows
from backend.families.key_map import KeyMap, Rows

_ENDS = {
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder": "cap_embedder",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_BLOCK = {
    "norm2": "attention_norm2",
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
}
_MODULATED = {"norm1.norm": "attention_norm1", "norm1.linear": "adaLN_modulation.1"}
_PLAIN = {"norm1": "attention_norm1"}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def lumina2_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built Lumina2Transformer2DModel of any depth and width."""
    lumina: Any = network
    modules: dict[str, str] = dict(_ENDS)
    rows: dict[str, Rows] = {}
    for kind in ("noise_refiner", "context_refiner", "layers"):
        for number, block in enumerate(getattr(lumina, kind)):
            names = {**_BLOCK, **(_MODULATED if block.modulation else _PLAIN)}
            modules.update({f"{kind}.{number}.{name}": f"{kind}.{number}.{other}" for name, other in names.items()})
            widths = [getattr(block.attn, name.removeprefix("attn.")).out_features for name in _QKV]
            parts = share_rows([f"{kind}.{number}.{name}" for name in _QKV], widths)
            rows.update(parts)
            modules.update(dict.fromkeys(parts, f"{kind}.{number}.attention.qkv"))
    return KeyMap(modules=modules, rows=rows)
