"""Tiny random Z-Image networks from diffusers, Qwen3 from transformers, and checkpoints of them, with formulas of this file alone for the original
layout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from backend.text_processing.qwen_tokenizer import build_qwen_tokenizer
from tests.support.dit_checkpoints import DitFiles, TextFile, settle, write_dit
from tests.support.flux_networks import make_random, make_vae

TEXT_WIDTH = 32
WIDTH = 48
CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "dim": WIDTH,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": [4, 6, 6],
}
_OWN_PADS = {"pads.picture": "x_pad_token", "pads.text": "cap_pad_token"}


def make_zimage(seed: int = 0, **changes: Any) -> ZImageTransformer2DModel:
    """diffusers' own network. All weights random, including norms, biases and the tokens of padding."""
    network = make_random(lambda: ZImageTransformer2DModel(**{**CONFIG, **changes}), seed)
    generator = torch.Generator().manual_seed(seed)
    for name in ("x_pad_token", "cap_pad_token"):
        getattr(network, name).copy_(torch.randn(1, network.dim, generator=generator) * 0.5)
    return network  # type: ignore[no-any-return]


def original_tensors(zimage: Any, prefix: str = "") -> dict[str, Tensor]:
    """Its weights in the original layout; also of our network, whose tokens of padding have other names."""
    sources = {_OWN_PADS.get(key, key): tensor for key, tensor in zimage.state_dict().items()}
    made: dict[str, Tensor] = {}
    for key in list(sources):
        if ".attention.to_q." in key:
            parts = [sources.pop(key.replace("to_q", name)) for name in ("to_q", "to_k", "to_v")]
            made[key.replace("to_q", "qkv")] = torch.cat(parts)
    for key, tensor in sources.items():
        for ours, original in (
            ("all_x_embedder.2-1.", "x_embedder."), ("all_final_layer.2-1.", "final_layer."), (".attention.to_out.0.", ".attention.out."),
            (".attention.norm_q.", ".attention.q_norm."), (".attention.norm_k.", ".attention.k_norm."),
        ):  # fmt: skip
            key = key.replace(ours, original)
        made[key] = tensor
    return {prefix + key: tensor.contiguous() for key, tensor in made.items()}


def library_flow(zimage: Any, x: Tensor, texts: list[Tensor], times: Tensor) -> Tensor:
    """noise - x0 of latents (B, 16, H, W) as the pipeline takes it: the network is given the time of a clean picture, and its output negated."""
    found = zimage(list(x.unsqueeze(2)), times, texts, return_dict=False)[0]
    return -torch.stack(list(found)).squeeze(2)


@cache
def qwen_tokenizer() -> Any:
    return build_qwen_tokenizer()


@cache
def qwen3_encoder(*, seed: int = 0, width: int = TEXT_WIDTH, layers: int = 3) -> Any:
    """transformers' own Qwen3Model in fp32. Equal arguments return the same object: do not modify it."""
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3Model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def write_zimage(data_dir: Path, layout: str = "original", *, name: str = "z_image_turbo", seed: int = 0, **changes: Any) -> DitFiles:
    zimage, vae, qwen = make_zimage(seed, **changes), make_vae(), qwen3_encoder()
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(9, TEXT_WIDTH, generator=generator)
    settle(zimage.all_final_layer["2-1"].linear, library_flow(zimage, x, [text], torch.tensor([0.5])), vae, 0.3611)
    tensors = {f"model.{key}": tensor for key, tensor in qwen.state_dict().items()}
    texts = {"qwen3": TextFile(network=qwen, tensors=tensors, file_name="qwen_3_4b.safetensors", prefix="text_encoders.qwen3_4b.transformer.")}
    return write_dit(data_dir, layout, name=name, transformer=zimage, original=original_tensors(zimage), vae=vae, texts=texts)
