"""The key maps against diffusers' single-file conversion (an independent implementation of the other direction)."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backend import key_layout
from backend.families.registry import find_family
from tests.support.checkpoints import FAMILIES, build_models
from tools.demo_model import networks as demo

SD15_FACTS = {
    "input_blocks.0.0.weight",
    "input_blocks.1.1.proj_in.weight",
    "input_blocks.3.0.op.weight",
    "input_blocks.11.0.out_layers.3.bias",
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "output_blocks.2.1.conv.weight",
    "output_blocks.5.2.conv.weight",
    "output_blocks.11.0.skip_connection.weight",
    "out.2.bias",
}
SDXL_FACTS = {
    "label_emb.0.2.weight",
    "input_blocks.7.1.transformer_blocks.3.ff.net.2.bias",
    "output_blocks.2.2.conv.weight",
    "output_blocks.5.2.conv.bias",
}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key


def _unet_there_and_back(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    ldm = key_layout.unet_to_ldm(unet.state_dict(), unet.config)
    assert len(ldm) == len(unet.state_dict())
    prefixed = {key_layout.UNET_PREFIX + key: tensor for key, tensor in ldm.items()}
    _same(convert_ldm_unet_checkpoint(prefixed, unet.config), dict(unet.state_dict()))
    return ldm


def _vae_there_and_back(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    ldm = key_layout.vae_to_ldm(vae.state_dict(), vae.config)
    assert len(ldm) == len(vae.state_dict())
    prefixed = {key_layout.VAE_PREFIX + key: tensor for key, tensor in ldm.items()}
    _same(convert_ldm_vae_checkpoint(prefixed, vae.config), dict(vae.state_dict()))
    return ldm


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_and_vae_survive_a_round_trip_through_diffusers_conversion(family, tmp_path):
    models = build_models(tmp_path / "x.safetensors", family)
    unet_keys = _unet_there_and_back(models.unet).keys()
    assert unet_keys >= (SDXL_FACTS if family == "sdxl" else SD15_FACTS)
    vae_ldm = _vae_there_and_back(models.vae)
    assert vae_ldm["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert {"decoder.up.3.upsample.conv.weight", "encoder.down.1.block.0.nin_shortcut.weight", "post_quant_conv.bias"} <= vae_ldm.keys()


def test_demo_checkpoint_shape_survives_a_round_trip():
    """Two levels, one resnet per level, attention on the outer level only; a text encoder of four layers."""
    unet_ldm = _unet_there_and_back(demo.build_unet())
    assert {
        "input_blocks.1.1.norm.weight",
        "input_blocks.2.0.op.weight",
        "output_blocks.1.1.conv.weight",
        "output_blocks.3.1.norm.weight",
    } <= unet_ldm.keys()
    _vae_there_and_back(demo.build_vae())
    joined = find_family("sd15").join_checkpoint(demo.build_unet(), demo.build_vae(), [demo.build_text_encoder()])
    assert "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight" in joined
    assert all(tensor.is_contiguous() for tensor in joined.values())


def test_uneven_layers_per_level_are_numbered_in_sequence():
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=(1, 2, 3),
        cross_attention_dim=32,
    )
    keys = key_layout.unet_to_ldm(unet.state_dict(), unet.config).keys()
    blocks = {".".join(key.split(".")[:2]) for key in keys if "put_blocks" in key}
    assert blocks == {f"input_blocks.{i}" for i in range(1 + 2 + 3 + 3)} | {f"output_blocks.{i}" for i in range(4 + 3 + 2)}
    assert "output_blocks.6.2.conv.weight" in keys and "output_blocks.3.1.conv.weight" in keys


@pytest.mark.parametrize("projection_dim", [None, 48])
def test_open_clip_survives_a_round_trip_through_diffusers_conversion(projection_dim):
    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, projection_dim=projection_dim or 64, hidden_act="gelu"
    )
    model = (CLIPTextModelWithProjection if projection_dim else CLIPTextModel)(config)
    fused = key_layout.clip_to_open_clip(model.state_dict())
    assert fused["transformer.resblocks.1.attn.in_proj_weight"].shape == (192, 64)
    if projection_dim:
        assert fused["text_projection"].shape == (64, 48)
    back = convert_open_clip_checkpoint(model, {f"p.{key}": tensor for key, tensor in fused.items()}, prefix="p.")
    _same(
        {key.removeprefix("text_model."): t for key, t in back.items()}, {key.removeprefix("text_model."): t for key, t in model.state_dict().items()}
    )


def test_sd2_files_carry_one_block_more_than_is_used(tmp_path):
    models = build_models(tmp_path / "x.safetensors", "sd20")
    joined = find_family("sd20").join_checkpoint(models.unet, models.vae, models.text_encoders)
    blocks = {key.split(".")[4] for key in joined if key.startswith("cond_stage_model.model.transformer.resblocks.")}
    assert len(blocks) == models.text_encoders[0].config.num_hidden_layers + 1


def test_unknown_keys_and_families_are_refused(tmp_path):
    with pytest.raises(KeyError, match="does not exist"):
        key_layout.unet_to_ldm({"motion.weight": torch.zeros(1)}, demo.build_unet().config)
    with pytest.raises(KeyError, match="does not exist"):
        key_layout.open_clip_key("visual.proj")
    with pytest.raises(ValueError, match="has 1 text encoders, but 0 were given"):
        find_family("sd15").join_checkpoint(demo.build_unet(), demo.build_vae(), [])
