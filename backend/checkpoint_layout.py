"""Finds the parts of a checkpoint in a file: their prefixes and key layouts. Reads names only; shapes are read elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from backend import key_layout


class Layout(Enum):
    """How a part's keys are written."""

    LDM = "ldm"
    """The original single-file names for UNet and VAE."""
    DIFFUSERS = "diffusers"
    """Diffusers' names for UNet and VAE."""
    TRANSFORMERS = "transformers"
    """Transformers' names for CLIP, with or without a `text_model.` level."""
    OPEN_CLIP = "open_clip"
    """OpenCLIP's names for its text tower, with fused attention projections."""


@dataclass(frozen=True, slots=True)
class Part:
    """One network in a file. `prefix` never includes `text_model.`; `slot` is "clip_l" or "clip_g" if the prefix says so, else None."""

    prefix: str
    layout: Layout
    slot: str | None = None


_UNET_PREFIXES = (key_layout.UNET_PREFIX, "unet.", "diffusion_model.", "")
_CONTROLNET_PREFIXES = ("control_model.", "controlnet.", "")
_VAE_PREFIXES = (key_layout.VAE_PREFIX, "vae.", "")
VIDEO_VAE_MARK = "decoder.mid_block.resnets.0.norm1.gamma"
"""In diffusers' layout of Qwen-Image's and Wan's VAE."""
_CLIP_PREFIXES = {
    key_layout.CLIP_L_PREFIX: "clip_l",
    key_layout.SDXL_CLIP_L_PREFIX: "clip_l",
    "text_encoder.": "clip_l",
    "text_encoder_2.": "clip_g",
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "clip_l.transformer.": "clip_l",
    "clip_g.transformer.": "clip_g",
    "clip_h.transformer.": None,
    "transformer.": None,
    "": None,
}
_OPEN_CLIP_PREFIXES = {
    key_layout.OPEN_CLIP_PREFIX: None,
    key_layout.SDXL_OPEN_CLIP_PREFIX: "clip_g",
    key_layout.REFINER_OPEN_CLIP_PREFIX: "clip_g",
    "model.": None,
    "": None,
}


def find_unet(keys: Collection[str]) -> Part | None:
    """The denoiser, or None. Any of its blocks is enough; missing parts are reported when it is built."""
    for prefix in _UNET_PREFIXES:
        if _any_starts(keys, f"{prefix}input_blocks.", f"{prefix}output_blocks.") and not _any_starts(keys, f"{prefix}input_hint_block."):
            return Part(prefix, Layout.LDM)
        if _any_starts(keys, f"{prefix}up_blocks.") and _any_starts(keys, f"{prefix}time_embedding."):
            return Part(prefix, Layout.DIFFUSERS)
    return None


def find_controlnet(keys: Collection[str]) -> Part | None:
    """A ControlNet for a UNet, or None."""
    for prefix in _CONTROLNET_PREFIXES:
        if _any_starts(keys, f"{prefix}zero_convs.") and _any_starts(keys, f"{prefix}input_blocks."):
            return Part(prefix, Layout.LDM)
        if _any_starts(keys, f"{prefix}controlnet_cond_embedding.") and _any_starts(keys, f"{prefix}controlnet_down_blocks."):
            return Part(prefix, Layout.DIFFUSERS)
    return None


def find_vae(keys: Collection[str]) -> Part | None:
    """The VAE for pictures, or None. That of Qwen-Image and Wan, which is another network, shares some names with it."""
    for prefix in _VAE_PREFIXES:
        if f"{prefix}{VIDEO_VAE_MARK}" in keys:
            continue
        if _any_starts(keys, f"{prefix}decoder.mid_block.", f"{prefix}decoder.up_blocks."):
            return Part(prefix, Layout.DIFFUSERS)
        if _any_starts(keys, f"{prefix}decoder.mid.", f"{prefix}decoder.up."):
            return Part(prefix, Layout.LDM)
    return None


def find_text_encoders(keys: Collection[str]) -> Sequence[Part]:
    """All CLIP text encoders in the file."""
    parts = []
    for prefix, slot in _CLIP_PREFIXES.items():
        if _any_starts(keys, f"{prefix}text_model.embeddings.", f"{prefix}text_model.encoder.", f"{prefix}embeddings.token_embedding."):
            parts.append(Part(prefix, Layout.TRANSFORMERS, slot))
    for prefix, slot in _OPEN_CLIP_PREFIXES.items():
        if _any_starts(keys, f"{prefix}transformer.resblocks."):
            parts.append(Part(prefix, Layout.OPEN_CLIP, slot))
    return parts


def _any_starts(keys: Collection[str], *starts: str) -> bool:
    return any(key.startswith(starts) for key in keys)
