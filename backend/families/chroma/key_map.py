"""Maps names of Chroma's weights between diffusers' transformer (ours) and the original files: Flux.1's blocks, and the distilled guidance layer.

    distilled_guidance_layer.layers.0.linear_1, linear_2     distilled_guidance_layer.layers.0.in_layer, out_layer
    distilled_guidance_layer.norms.0.weight                  distilled_guidance_layer.norms.0.scale

Knows no files and no devices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from backend.families.flux.key_map import RESPELLED, flux_key_map
from backend.families.key_map import KeyMap

_NET = "distilled_guidance_layer"


def chroma_key_map(network: nn.Module) -> KeyMap:
    """The key map of a built ChromaTransformer2DModel of any depth and width."""
    chroma: Any = network
    blocks = flux_key_map(network)
    modules, respelled = dict(blocks.modules), dict(RESPELLED)
    for number in range(len(chroma.distilled_guidance_layer.layers)):
        modules[f"{_NET}.layers.{number}.linear_1"] = f"{_NET}.layers.{number}.in_layer"
        modules[f"{_NET}.layers.{number}.linear_2"] = f"{_NET}.layers.{number}.out_layer"
        modules[f"{_NET}.norms.{number}.weight"] = f"{_NET}.norms.{number}.scale"
        respelled[f"norms.{number}.scale"] = f"norms.{number}.weight"
    return replace(blocks, modules=modules, respelled=respelled)
