"""Maps names of Z-Image's weights between diffusers' transformer (ours) and the original files.

    layers.0.attention.to_q, to_k, to_v     layers.0.attention.qkv             rows in equal thirds
    layers.0.attention.to_out.0             layers.0.attention.out
    all_x_embedder.2-1                      x_embedder

Knows no files and no devices.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from backend.families.flux.key_map import share_rows
from backend.families.key_map import KeyMap, Rows

_ENDS = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1": "final_layer",
    "pads.picture": "x_pad_token",
    "pads.text": "cap_pad_token",
}
ATTENTION = {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}
QKV = ("to_q", "to_k", "to_v")


def zimage_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built ZImageTransformer2DModel of any depth and width."""
    zimage: Any = network
    modules: dict[str, str] = dict(_ENDS)
    rows: dict[str, Rows] = {}
    for kind in ("noise_refiner", "context_refiner", "layers"):
        for number in range(len(getattr(zimage, kind))):
            attention = f"{kind}.{number}.attention"
            modules.update({f"{attention}.{name}": f"{attention}.{other}" for name, other in ATTENTION.items()})
            parts = share_rows([f"{attention}.{name}" for name in QKV], [zimage.dim] * 3)
            rows.update(parts)
            modules.update(dict.fromkeys(parts, f"{attention}.qkv"))
    return KeyMap(modules=modules, rows=rows)
