"""Identifies a file by its tensor names, to tell the user where a file belongs that is not a checkpoint.

Knows the names of other kinds of files, but cannot read any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class FileKind:
    """One kind of file: how to recognize it, its common name, and what to do with it.

    `never_holds_unet`: its keys may look like a UNet's, but are not.
    """

    name: str
    remedy: str
    matches: Callable[[Collection[str]], bool]
    never_holds_unet: bool = False


def _any_part(*parts: str) -> Callable[[Collection[str]], bool]:
    return lambda keys: any(part in key for key in keys for part in parts)


def _any_start(*starts: str) -> Callable[[Collection[str]], bool]:
    return lambda keys: any(key.startswith(starts) for key in keys)


def _any_end(end: str) -> Callable[[Collection[str]], bool]:
    return lambda keys: any(key.endswith(end) for key in keys)


def _has_all(*names: str) -> Callable[[Collection[str]], bool]:
    return lambda keys: all(name in keys for name in names)


def _is_embedding(keys: Collection[str]) -> bool:
    return _any_start("string_to_param", "emb_params")(keys) or (0 < len(keys) <= 2 and set(keys) <= {"clip_l", "clip_g", "", "t5xxl"})


def _is_hypernetwork(keys: Collection[str]) -> bool:
    return len(keys) > 0 and all(key.split(".")[0] in {"320", "640", "768", "1024", "1280", "2048"} for key in keys)


def _belongs(folder: str, how: str = "") -> str:
    return f"Put it into {folder}{how}"


_NO_SUPPORT = "This program does not know this model; docs/families.md lists those that it makes pictures with"
_CHECKPOINT = _belongs("models/Stable-diffusion", " and choose it as the checkpoint; if it is chosen already, it is incomplete: download it again")

KINDS: tuple[FileKind, ...] = (
    FileKind(
        name="a ControlNet model",
        remedy=_belongs("models/ControlNet", " and choose it in the ControlNet panel"),
        matches=_any_start(
            "control_model.",
            "controlnet_cond_embedding.",
            "controlnet_down_blocks.",
            "input_hint_block.",
            "lllite_",
            "controlnet_blocks.",
            "zero_convs.",
        ),
    ),
    FileKind(
        name="a T2I adapter",
        remedy=_belongs("models/ControlNet", " and choose it in the ControlNet panel"),
        matches=_any_start("adapter.body.", "body.0.in_conv", "body.0.block1", "body.0.resnets"),
    ),
    FileKind(
        name="an IP-Adapter",
        remedy=_belongs("models/ControlNet", " and choose it in the ControlNet panel"),
        matches=_any_start("ip_adapter.", "image_proj.", "image_proj_model."),
    ),
    FileKind(
        name="a LoRA",
        never_holds_unet=True,
        remedy=_belongs("models/Lora", " and write <lora:NAME:1> in the prompt"),
        matches=_any_part(
            ".lora_down.",
            ".lora_up.",
            ".lora_A.",
            ".lora_B.",
            ".hada_w1_a",
            ".lokr_w",
            ".lora.down.",
            ".oft_blocks",
            ".oft_diag",
            "lora_unet_",
            "lora_te",
        ),
    ),
    FileKind(name="an embedding (textual inversion)", remedy=_belongs("embeddings", " and write its name in the prompt"), matches=_is_embedding),
    FileKind(name="a hypernetwork", remedy="Hypernetworks are not supported; many exist as a LoRA as well", matches=_is_hypernetwork),
    FileKind(
        name="an AnimateDiff motion module", remedy="Motion modules are not checkpoints; video is not supported", matches=_any_part("motion_modules.")
    ),
    FileKind(
        name="a Chroma checkpoint",
        remedy=_CHECKPOINT,
        matches=_any_start("distilled_guidance_layer.", "model.diffusion_model.distilled_guidance_layer."),
    ),
    FileKind(
        name="a Flux checkpoint",
        remedy=_CHECKPOINT,
        matches=_any_start("double_blocks.", "model.diffusion_model.double_blocks."),
    ),
    FileKind(name="a Stable Diffusion 3 checkpoint", remedy=_CHECKPOINT, matches=_any_start("joint_blocks.", "model.diffusion_model.joint_blocks.")),
    FileKind(
        name="a transformer model in diffusers' layout (Flux, SD3 or newer)",
        remedy=_NO_SUPPORT,
        matches=_any_start("transformer_blocks.", "single_transformer_blocks.", "transformer.transformer_blocks."),
    ),
    FileKind(
        name="a Stable Cascade model",
        remedy=_NO_SUPPORT,
        matches=_any_start("clip_txt_mapper.", "clip_txt_pooled_mapper.", "down_blocks.0.0.channelwise."),
    ),
    FileKind(
        name="an upscaler",
        remedy=_belongs("models/ESRGAN", " and choose it in the Extras tab or under Hires. fix"),
        matches=_any_start(
            "model.0.weight", "model.1.sub.", "RRDB_trunk.", "conv_first.", "body.0.rdb1.", "body.0.weight", "layers.0.residual_group.", "upconv1."
        ),
    ),
    FileKind(
        name="a CLIP vision model",
        remedy=_belongs("models/ControlNet", " if an IP-Adapter needs it"),
        matches=_any_start("vision_model.", "visual.transformer.", "visual.blocks."),
    ),
    FileKind(
        name="a UMT5 text encoder",
        remedy="UMT5 belongs to the video model Wan, which is not supported",
        matches=_any_end("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    ),
    FileKind(
        name="a T5 text encoder",
        remedy=_belongs("models/text_encoder", " and choose it under 'VAE / Text Encoder' with a checkpoint that uses T5"),
        matches=_any_start("encoder.block.0.layer.0.SelfAttention", "enc.blk.", "shared.weight"),
    ),
    FileKind(
        name="a small preview decoder (TAESD)",
        remedy=_belongs("models/VAE-taesd"),
        matches=_has_all("1.weight", "3.conv.0.weight"),
    ),
    FileKind(
        name="the VAE of Qwen-Image and Wan 2.1",
        remedy=_belongs("models/VAE", " and choose it under 'VAE / Text Encoder' with a Qwen-Image checkpoint"),
        matches=_any_part("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"),
    ),
    FileKind(
        name="a VAE",
        remedy=_belongs("models/VAE", " and choose it under 'VAE / Text Encoder' with a checkpoint"),
        matches=_any_start("decoder.conv_in.", "first_stage_model.decoder.", "vae.decoder.", "encoder.conv_in."),
    ),
    FileKind(
        name="a Qwen or Gemma text encoder",
        remedy=_belongs("models/text_encoder", " and choose it under 'VAE / Text Encoder' with a checkpoint of its family"),
        matches=_any_part("layers.0.self_attn.q_proj.weight"),
    ),
    FileKind(
        name="a text encoder",
        remedy=_belongs("models/text_encoder", " and choose it under 'VAE / Text Encoder' with a checkpoint"),
        matches=_any_start(
            "text_model.",
            "transformer.resblocks.",
            "cond_stage_model.",
            "conditioner.embedders.",
            "text_encoder.",
            "text_encoder_2.",
            "embeddings.token_embedding.",
        ),
    ),
)


def identify(keys: Collection[str]) -> FileKind | None:
    """The kind of file with these tensor names, or None if no known kind matches."""
    return next((kind for kind in KINDS if kind.matches(keys)), None)
