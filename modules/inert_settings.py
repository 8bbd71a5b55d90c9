"""Settings that are kept for old files and requests and have no effect here: what is true instead. Said once when one is changed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

log = logging.getLogger(__name__)

WHAT_IS_TRUE: Mapping[str, str] = {
    "upcast_attn": "start with --force-upcast-attention",
    "cross_attention_optimization": "attention is chosen at start, with --attention-pytorch, --attention-split, --attention-quad or --xformers",
    "fp8_storage": "weights are kept in 8 bits by the setting forge_unet_storage_dtype, or with --unet-in-fp8-e4m3fn",
    "cache_fp16_weight": "weights for LoRA are not kept twice",
    "pad_cond_uncond": "prompts of different length are brought to one length anyhow",
    "pad_cond_uncond_v0": "prompts of different length are brought to one length anyhow",
    "batch_cond_uncond": "prompt and negative prompt share a batch whenever memory allows",
    "enable_batch_seeds": "pictures never depend on the batch they are made in",
    "no_dpmpp_sde_batch_determinism": "pictures never depend on the batch they are made in",
    "sdxl_clip_l_skip": "clip skip acts on both text encoders of SDXL",
    "sd_unet": "there is one UNet, the checkpoint's",
    "sd_hypernetwork": "hypernetworks are not available",
    "use_old_emphasis_implementation": "emphasis is chosen by the setting emphasis",
    "sd_vae_encode_method": "pictures are encoded by the full VAE",
    "sd_vae_decode_method": "pictures are decoded by the full VAE",
    "lora_functional": "there is one method",
    "lora_bundled_ti_to_infotext": "embeddings inside LoRA files are not read",
    "lora_not_found_warning_console": "the console always says it",
    "lora_not_found_gradio_warning": "it is said beside the pictures",
    "sd_vae_checkpoint_cache": "one VAE is loaded at a time",
    "forge_try_reproduce": "noise and schedules are chosen by the settings randn_source and sd_noise_schedule and by the schedule type",
    "forge_async_loading": "start with --cuda-stream",
    "forge_pin_shared_memory": "start with --pin-shared-memory",
    "auto_vae_precision_bfloat16": "a failed VAE pass is repeated in 32 bits",
    "ddim_discretize": "the chosen schedule type counts",
}

_said: set[str] = set()


def find_inert(options: Mapping[str, Any], defaults: Mapping[str, Any], keys: Collection[str] | None = None) -> list[str]:
    """A sentence for each setting (of `keys`, if given) that differs from its default and has no effect."""
    return [
        f"{key}: {options[key]!r} has no effect; {truth}."
        for key, truth in WHAT_IS_TRUE.items()
        if (keys is None or key in keys) and options[key] != defaults.get(key)
    ]


def warn_once(sentences: Collection[str]) -> None:
    """Log what was not logged before."""
    for sentence in sentences:
        if sentence not in _said:
            _said.add(sentence)
            log.warning("%s", sentence)
