"""Tiny random Krea 2 networks from diffusers, Qwen3-VL from transformers, and checkpoints of them, with formulas of this file alone for the original
layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.support.dit_checkpoints import DitFiles, TextFile, write_dit
from tests.support.flux_networks import make_random
from tests.support.kept import kept
from tests.support.qwenimage_networks import library_pack, make_qwen_vae, settle, wan_tensors

TEXT_WIDTH, TAPS = 32, (2, 5)
CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "timestep_embed_dim": 32,
    "text_hidden_dim": TEXT_WIDTH,
    "num_text_layers": len(TAPS),
    "text_num_attention_heads": 4,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 48,
    "num_layerwise_text_blocks": 2,
    "num_refiner_text_blocks": 2,
    "axes_dims_rope": [4, 6, 6],
}
PREFIX = "text_encoders.qwen3vl_4b.transformer."


@kept
def make_krea2(seed: int = 0, **changes: Any) -> Krea2Transformer2DModel:
    """diffusers' own network. All weights random, including norms, biases and tables."""
    network = make_random(lambda: Krea2Transformer2DModel(**{**CONFIG, **changes}), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.endswith("scale_shift_table"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network  # type: ignore[no-any-return]


def original_tensors(network: Any, prefix: str = "") -> dict[str, Tensor]:
    """Its weights in the original layout, where a block's table is one row."""
    made = {}
    for key, tensor in network.state_dict().items():
        name = key.replace("text_fusion.", "txtfusion.")
        for ours, original in (
            ("img_in.", "first."), ("time_embed.linear_1.", "tmlp.0."), ("time_embed.linear_2.", "tmlp.2."), ("time_mod_proj.", "tproj.1."),
            ("txt_in.norm.weight", "txtmlp.0.scale"), ("txt_in.linear_1.", "txtmlp.1."), ("txt_in.linear_2.", "txtmlp.3."),
            ("final_layer.linear.", "last.linear."), ("final_layer.norm.weight", "last.norm.scale"),
            ("final_layer.scale_shift_table", "last.modulation.lin"), ("transformer_blocks.", "blocks."),
        ):  # fmt: skip
            name = original + name.removeprefix(ours) if name.startswith(ours) else name
        for ours, original in (
            (".attn.to_q.", ".attn.wq."), (".attn.to_k.", ".attn.wk."), (".attn.to_v.", ".attn.wv."), (".attn.to_out.0.", ".attn.wo."),
            (".attn.to_gate.", ".attn.gate."), (".attn.norm_q.weight", ".attn.qknorm.qnorm.scale"),
            (".attn.norm_k.weight", ".attn.qknorm.knorm.scale"), (".ff.", ".mlp."), (".norm1.weight", ".prenorm.scale"),
            (".norm2.weight", ".postnorm.scale"), (".scale_shift_table", ".mod.lin"),
        ):  # fmt: skip
            name = name.replace(ours, original)
        made[prefix + name] = tensor.flatten() if name.endswith(".mod.lin") else tensor
    return made


def library_flow(network: Any, x: Tensor, text: Tensor, times: Tensor, mask: Tensor | None = None) -> Tensor:
    """noise - x0 of latents (B, 16, H, W) with even sides; `text` (B, T, layers * width), the layers side by side."""
    (batch, channels, height, width), num_text = x.shape, text.shape[1]
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    flow = network(
        hidden_states=library_pack(x), encoder_hidden_states=text.unflatten(-1, (len(TAPS), -1)), timestep=times,
        position_ids=torch.cat([torch.zeros(num_text, 3), places]), encoder_attention_mask=mask, return_dict=False,
    )[0]  # fmt: skip
    cells = flow.view(batch, height // 2, width // 2, channels, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


@cache
def qwen3_vl(*, seed: int = 0, width: int = TEXT_WIDTH) -> Any:
    """transformers' own Qwen3VLModel in fp32, of six layers, with the published base of its rotations. Equal arguments return the same object."""
    text = {
        "vocab_size": 151_936, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width, "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def write_krea2(data_dir: Path, layout: str = "original", *, name: str = "krea2_turbo", seed: int = 0, **changes: Any) -> DitFiles:
    network, vae, qwen = make_krea2(seed, **changes), make_qwen_vae(), qwen3_vl()
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 9, len(TAPS) * TEXT_WIDTH, generator=generator)
    settle(network.final_layer.linear, library_flow(network, x, text, torch.tensor([0.5])), vae)
    tensors = {f"{'' if layout == 'diffusers' else 'model.'}{key}": tensor for key, tensor in qwen.state_dict().items()}
    texts = {"qwen3_vl": TextFile(network=qwen, tensors=tensors, file_name="qwen3vl_4b_bf16.safetensors", prefix=PREFIX)}
    return write_dit(
        data_dir, layout, name=name, transformer=network, original=original_tensors(network), vae=vae, texts=texts, original_vae=wan_tensors(vae),
        vae_name="qwen_image_vae",
    )  # fmt: skip
