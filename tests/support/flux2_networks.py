"""Tiny random Flux.2 networks and VAEs from diffusers, Qwen3 from transformers, and checkpoints of them, with formulas of this file alone for the
original layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor

from backend.key_layout import vae_to_ldm
from tests.support.dit_checkpoints import DitFiles, TextFile, scale, write_dit
from tests.support.flux_networks import make_random
from tests.support.kept import kept
from tests.support.zimage_networks import qwen3_encoder

QWEN_WIDTH = 16
TEXT_WIDTH = 3 * QWEN_WIDTH
WIDTH = 48
CONFIG: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "timestep_guidance_channels": 32,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 32,
    "norm_num_groups": 32,
}


@kept
def make_flux2(seed: int = 0, **changes: Any) -> Flux2Transformer2DModel:
    """diffusers' own network. All weights random, including norms."""
    return make_random(lambda: Flux2Transformer2DModel(**{**CONFIG, **changes}), seed)


@kept
def make_flux2_vae(seed: int = 1, **changes: Any) -> AutoencoderKLFlux2:
    """With statistics that differ from channel to channel."""
    vae = make_random(lambda: AutoencoderKLFlux2(**{**VAE_CONFIG, **changes}), seed)
    generator = torch.Generator().manual_seed(seed)
    vae.bn.running_mean.copy_(torch.randn(128, generator=generator) * 0.3)
    vae.bn.running_var.copy_(torch.rand(128, generator=generator) * 0.8 + 0.4)
    return vae


def original_tensors(flux2: Any, prefix: str = "") -> dict[str, Tensor]:
    """A transformer's weights in Black Forest Labs' layout."""
    sources, made = dict(flux2.state_dict()), {}

    def move(name: str, *ours: str, end: str = "weight") -> None:
        made[f"{name}.{end}"] = torch.cat([sources.pop(f"{our}.weight") for our in ours])

    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    for number, layer in ((1, "in_layer"), (2, "out_layer")):
        move(f"time_in.{layer}", f"time_guidance_embed.timestep_embedder.linear_{number}")
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        move(f"{name}.lin", f"{name}.linear")
    for number in range(flux2.config.num_layers):
        old, new = f"transformer_blocks.{number}", f"double_blocks.{number}"
        for stream, qkv, norms, out, mlp in (
            ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context"),
        ):
            move(f"{new}.{stream}_attn.qkv", *(f"{old}.attn.{name}" for name in qkv))
            move(f"{new}.{stream}_attn.norm.query_norm", f"{old}.attn.{norms[0]}", end="scale")
            move(f"{new}.{stream}_attn.norm.key_norm", f"{old}.attn.{norms[1]}", end="scale")
            move(f"{new}.{stream}_attn.proj", f"{old}.attn.{out}")
            move(f"{new}.{stream}_mlp.0", f"{old}.{mlp}.linear_in")
            move(f"{new}.{stream}_mlp.2", f"{old}.{mlp}.linear_out")
    for number in range(flux2.config.num_single_layers):
        old, new = f"single_transformer_blocks.{number}.attn", f"single_blocks.{number}"
        move(f"{new}.linear1", f"{old}.to_qkv_mlp_proj")
        move(f"{new}.linear2", f"{old}.to_out")
        move(f"{new}.norm.query_norm", f"{old}.norm_q", end="scale")
        move(f"{new}.norm.key_norm", f"{old}.norm_k", end="scale")
    move("final_layer.linear", "proj_out")
    scales, shifts = sources.pop("norm_out.linear.weight").chunk(2)
    made["final_layer.adaLN_modulation.1.weight"] = torch.cat([shifts, scales])
    assert not sources, sorted(sources)
    return {prefix + key: tensor.contiguous() for key, tensor in made.items()}


def original_vae(vae: Any) -> dict[str, Tensor]:
    """A VAE's weights in Black Forest Labs' layout, which has the convolutions around the latents inside the halves."""
    made = vae_to_ldm(vae.state_dict(), vae.config)
    return {
        f"{'encoder' if key.startswith('quant') else 'decoder'}.{key}" if key.startswith(("quant_conv", "post_quant_conv")) else key: tensor
        for key, tensor in made.items()
    }


def library_flow(flux2: Any, x: Tensor, text: Tensor, times: Tensor, references: tuple[Tensor, ...] = ()) -> Tensor:
    """noise - x0 of latents (B, 128, H, W), with positions as the pipeline makes them."""
    pipeline = Flux2KleinPipeline
    pictures = [pipeline._pack_latents(one).expand(len(x), -1, -1) for one in (x, *references)]
    ids = [pipeline._prepare_latent_ids(x)[:1], *([pipeline._prepare_image_ids(list(references))] if references else [])]
    found = flux2(
        hidden_states=torch.cat(pictures, dim=1), timestep=times, encoder_hidden_states=text, txt_ids=pipeline._prepare_text_ids(text),
        img_ids=torch.cat(ids, dim=1), return_dict=False,
    )[0]  # fmt: skip
    height, width = x.shape[-2:]
    return found[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


@torch.no_grad()
def settle(flux2: Any, vae: Any) -> None:
    """Flows of about the noise's size, pictures mostly within -1..1, a narrow posterior; all by powers of two."""
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 128, 4, 4, generator=generator), torch.randn(1, 9, TEXT_WIDTH, generator=generator)
    scale(flux2.proj_out, 0.7 / float(library_flow(flux2, x, text, torch.tensor([0.5])).std()))
    picture = vae.decode(torch.randn(1, 32, 8, 8, generator=generator)).sample
    scale(vae.decoder.conv_out, 0.4 / float(picture.std()))
    vae.encoder.conv_out.bias[32:].sub_(16.0)


def write_flux2(data_dir: Path, layout: str = "original", *, name: str = "flux-2-klein-4b", seed: int = 0, **changes: Any) -> DitFiles:
    flux2, vae, qwen = make_flux2(seed, **changes), make_flux2_vae(), qwen3_encoder(width=QWEN_WIDTH, layers=4)
    settle(flux2, vae)
    tensors = {f"model.{key}": tensor for key, tensor in qwen.state_dict().items()}
    texts = {"qwen3": TextFile(network=qwen, tensors=tensors, file_name="qwen_3_4b.safetensors", prefix="text_encoders.qwen3_4b.transformer.")}
    return write_dit(
        data_dir, layout, name=name, transformer=flux2, original=original_tensors(flux2), vae=vae, texts=texts, original_vae=original_vae(vae)
    )  # fmt: skip
