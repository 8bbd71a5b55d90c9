"""Maps names of Anima's weights between diffusers' networks (ours) and the original files.

    transformer_blocks.0.norm1.linear_1, norm2, norm3      blocks.0.adaln_modulation_self_attn.1, _cross_attn, _mlp
    transformer_blocks.0.attn1.to_q, to_out.0, norm_q      blocks.0.self_attn.q_proj, output_proj, q_norm
    text_conditioner                                       llm_adapter

Knows no files and no devices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from backend.families.key_map import KeyMap

_ENDS = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder": "t_embedder.1",
    "time_embed.norm": "t_embedding_norm",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
    "proj_out": "final_layer.linear",
    "text_conditioner": "llm_adapter",
}
_NORMS = {"norm1": "adaln_modulation_self_attn", "norm2": "adaln_modulation_cross_attn", "norm3": "adaln_modulation_mlp"}
_ATTENTIONS = {"attn1": "self_attn", "attn2": "cross_attn"}
_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "output_proj", "norm_q": "q_norm", "norm_k": "k_norm"}
_BLOCK = {
    **{f"{ours}.linear_{number}": f"{original}.{number}" for ours, original in _NORMS.items() for number in (1, 2)},
    **{f"{ours}.{name}": f"{original}.{other}" for ours, original in _ATTENTIONS.items() for name, other in _ATTENTION.items()},
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
}


def anima_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built AnimaTransformer of any depth and width."""
    anima: Any = network
    modules = dict(_ENDS)
    for number in range(len(anima.transformer_blocks)):
        modules.update({f"transformer_blocks.{number}.{name}": f"blocks.{number}.{other}" for name, other in _BLOCK.items()})
    return KeyMap(modules=modules)
