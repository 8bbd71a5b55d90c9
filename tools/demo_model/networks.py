"""The demo checkpoint's three networks: the SD1.x design, but small. Only shapes are chosen here; the classes are diffusers' and transformers'."""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tools.demo_model.scenes import SIDE_PX as SIDE_PX

LATENT_FACTOR = 8
LATENT_SCALE = 0.18215
CONTEXT_CHANNELS = 128


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=LATENT_SCALE,
        sample_size=SIDE_PX,
    )


def build_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=CONTEXT_CHANNELS,
        intermediate_size=CONTEXT_CHANNELS * 4,
        num_hidden_layers=4,
        num_attention_heads=CONTEXT_CHANNELS // 64,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=CONTEXT_CHANNELS,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE_PX // LATENT_FACTOR,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 160),
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=CONTEXT_CHANNELS,
    )
