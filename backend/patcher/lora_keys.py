"""Names in LoRA files: which layer of the loaded networks a name refers to, and which part of its change a tensor is.

A key is a layer's name plus a part's name: "lora_unet_mid_block_attentions_0_proj_in" + ".lora_up.weight". All layer names that trainers use are
listed for every layer of the loaded networks, so nothing has to be guessed. Knows no formulas and no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from backend.families.key_map import Rows

UNET_PREFIX = "diffusion_model."
T5_SLOT = "t5xxl"

_PARTS: dict[str, str] = {
    ".lora_up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_mid.weight": "mid",
    "_lora.up.weight": "up",
    "_lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".up.weight": "up",
    ".down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B": "up",
    ".lora_A": "down",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".magnitude": "magnitude",
    **{f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    ".oft_blocks": "oft_blocks",
    ".oft_diag": "oft_diag",
    ".rescale": "rescale",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    ".set_weight": "set",
    ".on_input": "on_input",
    ".weight": "ia3",
}
"""Ending of a key -> the part. Longer endings are tried first."""
_ENDINGS = sorted(_PARTS, key=len, reverse=True)

PEFT_PREFIX = "base_model.model."


def split_key(key: str) -> tuple[str, str] | None:
    """(layer name as in the file, part); None for a key that is not part of a LoRA."""
    for ending in _ENDINGS:
        if key.endswith(ending):
            return key.removesuffix(ending).removeprefix(PEFT_PREFIX), _PARTS[ending]
    return None


def model_lora_keys_unet(model: nn.Module, key_map: dict[str, str] | None = None) -> dict[str, str]:
    """Add to `key_map`, for every layer of a KModel's UNet, all its names -> the name of its weight in the KModel."""
    key_map = {} if key_map is None else key_map
    network: Any = model
    for layer in _layer_names(network.diffusion_model):
        place = network.key_map.original(layer)
        target = f"{UNET_PREFIX}{layer}.weight"
        for alias in _unet_aliases(layer, None if place.rows else place.key):
            key_map.setdefault(alias, target)
    return key_map


def shared_lora_keys_unet(model: nn.Module) -> dict[str, dict[str, Rows]]:
    """For layers that are one in files and several in the KModel's network: their names -> the weights of ours, with their rows."""
    network: Any = model
    found: dict[str, dict[str, Rows]] = {}
    for original, parts in (*network.key_map.shared(), *network.key_map.lora_names.items()):
        targets = {f"{UNET_PREFIX}{layer}.weight": rows for layer, rows in parts.items()}
        found.update(dict.fromkeys(_unet_aliases(original, None), targets))
    return found


def _unet_aliases(layer: str, original: str | None) -> Iterator[str]:
    for name in (layer, original):
        if name is not None:
            yield f"lora_unet_{_flat(name)}"
            yield f"lycoris_{_flat(name)}"
            yield f"lora_transformer_{_flat(name)}"  # OneTrainer
            yield f"{UNET_PREFIX}{name}"
            yield f"transformer.{name}"
            yield name
    processor = re.sub(r"\.to_([qkv]|out)(\.0)?$", r".processor.to_\1", layer)  # diffusers before 0.22
    for name in dict.fromkeys((layer, processor, layer.removesuffix(".0") if layer.endswith(".to_out.0") else layer)):
        yield name
        yield f"unet.{name}"
    yield f"lycoris_unet_{_flat(layer)}"


def model_lora_keys_clip(model: nn.Module, key_map: dict[str, str] | None = None) -> dict[str, str]:
    """Add to `key_map`, for every layer of the text encoders (a JointTextEncoder), all its names -> the name of its weight there."""
    key_map = {} if key_map is None else key_map
    assert isinstance(model, nn.ModuleDict)
    is_second = False
    for slot, encoder in model.items():
        for layer in _layer_names(encoder):
            aliases = _t5_aliases(layer) if slot == T5_SLOT else _text_aliases(layer.removeprefix("text_model."), slot, is_second=is_second)
            for alias in aliases:
                key_map.setdefault(alias, f"{slot}.{layer}.weight")
        is_second = True
    return key_map


def _t5_aliases(layer: str) -> Iterator[str]:
    """kohya counts T5 as the third text encoder, also where there are two; diffusers as the second (Flux.1) or third (SD3)."""
    for prefix in ("lora_te3", "lora_te2", "lycoris_text_encoder_2"):
        yield f"{prefix}_{_flat(layer)}"
    for prefix in ("text_encoder_2", "text_encoder_3", T5_SLOT, f"{T5_SLOT}.transformer"):
        yield f"{prefix}.{layer}"


def _text_aliases(layer: str, slot: str, *, is_second: bool) -> Iterator[str]:
    """`layer` has no "text_model."; text_projection is written without that level anyway."""
    full = layer if layer.startswith("text_projection") else f"text_model.{layer}"
    kohya, diffusers = (("lora_te2",), "text_encoder_2") if is_second else (("lora_te", "lora_te1"), "text_encoder")
    if slot == "clip_g" and not is_second:  # the SDXL refiner's only encoder is the base's second
        kohya = (*kohya, "lora_te2")
    for prefix in kohya:
        yield f"{prefix}_{_flat(full)}"
    for name in dict.fromkeys((full, layer)):
        yield f"{diffusers}.{name}"
        yield f"{slot}.{name}"
        yield f"{slot}.transformer.{name}"
        yield f"lycoris_{diffusers}_{_flat(name)}"
    if not is_second:
        yield full
        yield f"lycoris_{_flat(full)}"


def _layer_names(model: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith(".weight")]


def _flat(name: str) -> str:
    return name.replace(".", "_")


# families


_FAMILY_BY_VERSION = (
    (("sdxl", "stable-diffusion-xl"), "SDXL"),
    (("sd_v1", "stable-diffusion-v1", "sd1"), "SD 1.x"),
    (("sd_v2", "stable-diffusion-v2", "sd2"), "SD 2.x"),
    (("flux2", "flux-2", "flux.2"), "Flux.2"),
    (("flux",), "Flux.1"),
    (("sd3", "stable-diffusion-3"), "SD 3"),
    (("hunyuan",), "Hunyuan"),
    (("wan",), "Wan"),
    (("qwen",), "Qwen-Image"),
    (("lumina",), "Lumina"),
    (("auraflow",), "AuraFlow"),
    (("chroma",), "Chroma"),
)
_FAMILY_BY_LAYER = (
    (("stream_modulation", "to_qkv_mlp_proj", "ff_linear_in", "ff.linear_in"), "Flux.2"),
    (("img_mod_lin", "img_mod.lin", "_modulation_lin", ".modulation.lin"), "Flux.1"),
    (("double_blocks", "single_blocks", "single_transformer_blocks"), "Flux"),
    (("img_mlp_net", "img_mlp.net", "txt_mlp_net", "txt_mlp.net", "img_mod_1", "img_mod.1"), "Qwen-Image"),
    (("joint_blocks", "attn_add_k_proj", "attn.add_k_proj"), "SD 3"),
    (("lora_te2_", "text_encoder_2.", "input_blocks_8_1_transformer_blocks_1", "down_blocks_2_attentions_1_transformer_blocks_9"), "SDXL"),
)
_FAMILY_BY_CONTEXT_WIDTH = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}


def family_in_metadata(metadata: Mapping[str, str]) -> str | None:
    """The family that a trainer recorded in the file, or None."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        version = metadata.get(key, "").lower()
        for starts, family in _FAMILY_BY_VERSION:
            if version.startswith(starts):
                return family
    return None


def family_of_layers(context_widths: Mapping[str, int]) -> str | None:
    """The family that layer names imply. `context_widths` maps each name to the number of inputs of its change, 0 if unknown."""
    for marks, family in _FAMILY_BY_LAYER:
        if any(mark in name for name in context_widths for mark in marks):
            return family
    widths = [width for name, width in context_widths.items() if re.search(r"attn2[._](processor[._])?to_[kv]$", name)]
    return next((_FAMILY_BY_CONTEXT_WIDTH[width] for width in widths if width in _FAMILY_BY_CONTEXT_WIDTH), None)
