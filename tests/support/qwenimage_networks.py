"""Tiny random Qwen-Image networks and VAEs from diffusers, Qwen2.5-VL from transformers, and checkpoints of them, with formulas of this file alone
for the original layouts."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.support.dit_checkpoints import DitFiles, TextFile, scale, write_dit
from tests.support.flux_networks import make_random
from tests.support.kept import kept

TEXT_WIDTH = 32
WIDTH = 48
CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
    "zero_cond_t": False,
}
VAE_CONFIG: dict[str, Any] = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
PREFIX = "text_encoders.qwen25_7b.transformer."


@kept
def make_qwenimage(seed: int = 0, **changes: Any) -> QwenImageTransformer2DModel:
    """diffusers' own network. All weights random, including norms and biases."""
    return make_random(lambda: QwenImageTransformer2DModel(**{**CONFIG, **changes}), seed)


@kept
def make_qwen_vae(seed: int = 1, **changes: Any) -> AutoencoderKLQwenImage:
    vae = make_random(lambda: AutoencoderKLQwenImage(**{**VAE_CONFIG, **changes}), seed)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return vae  # type: ignore[no-any-return]


def original_tensors(network: Any, prefix: str = "") -> dict[str, Tensor]:
    """The original files have the library's names."""
    return {prefix + key: tensor for key, tensor in network.state_dict().items()}


def wan_tensors(vae: Any) -> dict[str, Tensor]:
    """A VAE's weights in Wan's layout, where a level's resnets and its resampling are numbered on."""
    levels = vae.config.num_res_blocks + 2
    made = {}
    for key, tensor in vae.state_dict().items():
        name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", key))
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda found: f"upsamples.{levels * int(found[1]) + int(found[2])}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"upsamples.{levels * int(found[1]) + levels - 1}", name)
        name = name.replace("down_blocks", "downsamples").replace("mid_block.attentions.0", "middle.1")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"middle.{2 * int(found[1])}", name)
        for ours, original in (
            ("coder.conv_in", "coder.conv1"), ("norm_out", "head.0"), ("conv_out", "head.2"), ("conv_shortcut", "shortcut"),
        ):  # fmt: skip
            name = name.replace(ours, original)
        if re.search(r"samples\.\d+\.|middle\.[02]\.", name):
            for ours, original in (("norm1", "residual.0"), ("conv1", "residual.2"), ("norm2", "residual.3"), ("conv2", "residual.6")):
                name = name.replace(f".{ours}.", f".{original}.")
        made[name] = tensor
    return made


@cache
def qwen_vl(*, seed: int = 0, width: int = TEXT_WIDTH) -> Any:
    """transformers' own model in fp32, with a picture tower of eight blocks, the last of which sees the whole picture. Equal arguments return the
    same object: do not modify it."""
    text = {
        "vocab_size": 152_064, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": width // 16,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 8, "hidden_size": 64, "intermediate_size": 48, "num_heads": 16, "out_hidden_size": width, "fullatt_block_indexes": [7]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or "ln_q" in name
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.1 if "visual" in name else 0.3)
    return model


def text_tensors(qwen: Any, *, is_nested: bool = False) -> dict[str, Tensor]:
    """A text encoder's file: "model." and "visual." beside each other, or nested as transformers writes them today."""
    state = {key: tensor for key, tensor in qwen.state_dict().items() if key != "lm_head.weight"}
    if is_nested:
        return state
    return {key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor for key, tensor in state.items()}


def library_flow(network: Any, x: Tensor, text: Tensor, times: Tensor, mask: Tensor | None = None, references: tuple[Tensor, ...] = ()) -> Tensor:
    """noise - x0 of latents (B, 16, H, W) with even sides, as the pipeline calls the network."""
    packed = torch.cat([library_pack(one).expand(x.shape[0], -1, -1) for one in (x, *references)], dim=1)
    shapes = [(1, one.shape[2] // 2, one.shape[3] // 2) for one in (x, *references)]
    flow = network(
        hidden_states=packed, encoder_hidden_states=text, encoder_hidden_states_mask=mask, timestep=times, img_shapes=[shapes] * x.shape[0],
        return_dict=False,
    )[0]  # fmt: skip
    batch, channels, height, width = x.shape
    own = flow[:, : height * width // 4].view(batch, height // 2, width // 2, channels, 2, 2)
    return own.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def library_pack(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    cells = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, height * width // 4, channels * 4)


@torch.no_grad()
def settle(out_layer: Any, flow: Tensor, vae: Any) -> None:
    """Flows of about the noise's size, pictures mostly within -1..1, a narrow posterior; all by powers of two, which every type has exactly."""
    scale(out_layer, 0.7 / float(flow.std()))
    std, mean = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_std", "latents_mean"))
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    vae.decoder.conv_out.weight.mul_(2.0**-8), vae.decoder.conv_out.bias.zero_()  # the library clamps its pictures
    scale(vae.decoder.conv_out, 0.4 / float(vae.decode(latents * std + mean).sample.std()))
    vae.quant_conv.bias[16:].sub_(16.0)


def write_qwenimage(data_dir: Path, layout: str = "original", *, name: str = "qwen_image", seed: int = 0, **changes: Any) -> DitFiles:
    network, vae, qwen = make_qwenimage(seed, **changes), make_qwen_vae(), qwen_vl()
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 9, TEXT_WIDTH, generator=generator)
    settle(network.proj_out, library_flow(network, x, text, torch.tensor([0.5])), vae)
    tensors = text_tensors(qwen, is_nested=layout == "diffusers")
    texts = {"qwen25_vl": TextFile(network=qwen, tensors=tensors, file_name="qwen_2.5_vl_7b.safetensors", prefix=PREFIX)}
    return write_dit(
        data_dir, layout, name=name, transformer=network, original=original_tensors(network), vae=vae, texts=texts, original_vae=wan_tensors(vae),
        vae_name="qwen_image_vae",
    )  # fmt: skip
