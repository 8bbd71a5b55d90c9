"""Tiny random SD3 networks from diffusers, and checkpoints of them, with formulas of this file alone for the original layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.support.dit_checkpoints import DitFiles, TextFile, settle, write_dit
from tests.support.flux_checkpoints import make_clip
from tests.support.flux_networks import CLIP_WIDTH, make_random, make_vae
from tests.support.t5_encoders import t5_encoder, t5_state_dict

T5_WIDTH, CLIP_G_WIDTH = 96, 32
WIDTH = 32
CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "patch_size": 2,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": CLIP_WIDTH + CLIP_G_WIDTH,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
"""SD3.5 medium's parts: norms of queries and keys, a second attention in the first block."""
PLAIN = {"dual_attention_layers": (), "qk_norm": None, "attention_head_dim": 64, "num_attention_heads": 1, "caption_projection_dim": 64}
"""SD3 medium's."""


def make_sd3(seed: int = 0, **changes: Any) -> SD3Transformer2DModel:
    """diffusers' own network. All weights random, including norms and biases."""
    config = {**CONFIG, "sample_size": 16, **changes}
    return make_random(lambda: SD3Transformer2DModel(**config), seed)  # type: ignore[no-any-return]


def original_tensors(sd3: Any, prefix: str = "") -> dict[str, Tensor]:
    """Its weights in Stability's layout."""
    sources = dict(sd3.state_dict())
    made: dict[str, Tensor] = {"pos_embed": sources.pop("pos_embed.pos_embed")}

    def move(name: str, *ours: str) -> None:
        for end in ("weight", "bias"):
            if f"{ours[0]}.{end}" in sources:
                made[f"{name}.{end}"] = torch.cat([sources.pop(f"{our}.{end}") for our in ours])

    def move_swapped(name: str, ours: str) -> None:
        for end in ("weight", "bias"):
            scales, shifts = sources.pop(f"{ours}.{end}").chunk(2)
            made[f"{name}.{end}"] = torch.cat([shifts, scales])

    move("x_embedder.proj", "pos_embed.proj")
    move("context_embedder", "context_embedder")
    for original, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        move(f"{original}.mlp.0", f"time_text_embed.{ours}.linear_1")
        move(f"{original}.mlp.2", f"time_text_embed.{ours}.linear_2")
    last = sd3.config.num_layers - 1
    for number in range(last + 1):
        old, new = f"transformer_blocks.{number}", f"joint_blocks.{number}"
        if number == last:
            move_swapped(f"{new}.context_block.adaLN_modulation.1", f"{old}.norm1_context.linear")
        for stream, attention, qkv, norms, out, mod, mlp in (
            ("x_block", "attn", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"),
            ("x_block", "attn2", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "none", "none"),
            ("context_block", "attn", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "norm1_context",
             "ff_context"),
        ):  # fmt: skip
            move(f"{new}.{stream}.{attention}.qkv", *(f"{old}.{attention}.{name}" for name in qkv))
            move(f"{new}.{stream}.{attention}.ln_q", f"{old}.{attention}.{norms[0]}")
            move(f"{new}.{stream}.{attention}.ln_k", f"{old}.{attention}.{norms[1]}")
            move(f"{new}.{stream}.{attention}.proj", f"{old}.{attention}.{out}")
            move(f"{new}.{stream}.adaLN_modulation.1", f"{old}.{mod}.linear")
            move(f"{new}.{stream}.mlp.fc1", f"{old}.{mlp}.net.0.proj")
            move(f"{new}.{stream}.mlp.fc2", f"{old}.{mlp}.net.2")
    move("final_layer.linear", "proj_out")
    move_swapped("final_layer.adaLN_modulation.1", "norm_out.linear")
    assert not sources, sorted(sources)
    return {prefix + key: tensor.contiguous() for key, tensor in made.items()}


def make_clip_g(seed: int = 3) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=CLIP_G_WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=77,
        hidden_act="gelu", projection_dim=CLIP_G_WIDTH, bos_token_id=49406, eos_token_id=49407, pad_token_id=0,
    )  # fmt: skip
    return make_random(lambda: CLIPTextModelWithProjection(config), seed)  # type: ignore[no-any-return]


def write_sd3(data_dir: Path, layout: str = "original", *, name: str = "sd35", seed: int = 0, with_t5: bool = True, **changes: Any) -> DitFiles:
    """`with_t5`: with T5 inside, or as a module of its own."""
    sd3, vae = make_sd3(seed, **changes), make_vae(scaling_factor=1.5305, shift_factor=0.0609)
    clip_l, clip_g, t5 = make_clip(), make_clip_g(), t5_encoder(width=T5_WIDTH)
    generator = torch.Generator().manual_seed(7)
    x, context = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 9, T5_WIDTH, generator=generator)
    pooled = torch.randn(1, CONFIG["pooled_projection_dim"], generator=generator)
    settle(sd3.proj_out, sd3(x, context, pooled, torch.tensor([500.0]), return_dict=False)[0], vae, 1.5305)
    texts = {
        "clip_l": _clip_file(clip_l, "clip_l"),
        "clip_g": _clip_file(clip_g, "clip_g"),
        "t5xxl": TextFile(network=t5, tensors=t5_state_dict(t5), file_name="t5xxl_fp16.safetensors", prefix="text_encoders.t5xxl.transformer."),
    }
    if not with_t5:
        del texts["t5xxl"]
    return write_dit(data_dir, layout, name=name, transformer=sd3, original=original_tensors(sd3), vae=vae, texts=texts)


def _clip_file(clip: Any, name: str) -> TextFile:
    tensors = {key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": one for key, one in clip.state_dict().items()}
    return TextFile(network=clip, tensors=tensors, file_name=f"{name}.safetensors", prefix=f"text_encoders.{name}.transformer.")
