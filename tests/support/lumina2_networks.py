"""Tiny random Lumina2 networks from diffusers, Gemma2 from transformers with a made-up vocabulary, and checkpoints of them, with formulas of this
file alone for the original layout."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model

from backend.key_layout import vae_to_ldm
from backend.text_processing.sentencepiece_file import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from tests.support.dit_checkpoints import DitFiles, save, settle
from tests.support.flux_networks import make_random, make_vae

TEXT_WIDTH = 32
WIDTH = 72
CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "hidden_size": WIDTH,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 288,
    "axes_dim_rope": (8, 8, 8),
    "cap_feat_dim": TEXT_WIDTH,
}
MERGED = ("at", "ca", "cat", "\u2581c", "\u2581cat", "re", "red", "\u2581red", "er", "th", "the", "\u2581a", "in", "ing", "ou", "an", "\u2581\u2581a")
"""Made-up pieces, the most probable first."""


def make_lumina2(seed: int = 0, **changes: Any) -> Lumina2Transformer2DModel:
    """diffusers' own network. All weights random, including norms and biases."""
    return make_random(lambda: Lumina2Transformer2DModel(**{**CONFIG, **changes}), seed)  # type: ignore[no-any-return]


def original_tensors(lumina: Any, prefix: str = "") -> dict[str, Tensor]:
    """Its weights in the original layout."""
    sources = dict(lumina.state_dict())
    made: dict[str, Tensor] = {}
    for key in list(sources):
        if ".attn.to_q." in key:
            made[key.replace("attn.to_q", "attention.qkv")] = torch.cat([sources.pop(key.replace("to_q", name)) for name in ("to_q", "to_k", "to_v")])
    for key, tensor in sources.items():
        if "context_refiner" in key:
            key = key.replace(".norm1.", ".attention_norm1.")
        for ours, original in (
            ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("time_caption_embed.caption_embedder", "cap_embedder"), ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
            ("norm_out.linear_2", "final_layer.linear"), (".norm1.linear", ".adaLN_modulation.1"), (".norm1.norm", ".attention_norm1"),
            (".norm2.", ".attention_norm2."), (".attn.to_out.0", ".attention.out"), (".attn.norm_q", ".attention.q_norm"),
            (".attn.norm_k", ".attention.k_norm"), (".linear_1", ".w1"), (".linear_2", ".w2"), (".linear_3", ".w3"),
        ):  # fmt: skip
            key = key.replace(ours, original)
        made[key] = tensor
    return {prefix + key: tensor.contiguous() for key, tensor in made.items()}


def library_flow(lumina: Any, x: Tensor, context: Tensor, lengths: list[int], times: Tensor) -> Tensor:
    """noise - x0 as the pipeline takes it: the network is given the time of a clean picture, and its output negated."""
    mask = (torch.arange(context.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return -lumina(x, times, context, mask, return_dict=False)[0]  # type: ignore[no-any-return]


# Gemma2


def pieces() -> list[tuple[str, float, int]]:
    """Markers, bytes, a user's marker, printable characters and some merges."""
    found = [("<pad>", 0.0, CONTROL), ("<eos>", 0.0, CONTROL), ("<bos>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN), ("<mask>", 0.0, USER_DEFINED)]
    found += [("\n\n", 0.0, USER_DEFINED)]
    found += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    found += [(text, -float(rank), NORMAL) for rank, text in enumerate(MERGED)]
    return found + [(chr(code), -1000.0 - code, NORMAL) for code in (*range(33, 127), 0x2581)]


def spiece_model() -> bytes:
    """The pieces as a SentencePiece file."""

    def field(number: int, kind: int, data: bytes) -> bytes:
        return bytes([number << 3 | kind]) + (_varint(len(data)) if kind == 2 else b"") + data

    whole = b""
    for text, score, kind in pieces():
        inner = field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, _varint(kind))
        whole += field(1, 2, inner)
    return whole


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


@cache
def gemma2_encoder() -> Any:
    """transformers' own Gemma2Model in fp32. Do not modify it."""
    config = Gemma2Config(
        vocab_size=len(pieces()), hidden_size=TEXT_WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
        head_dim=8, query_pre_attn_scalar=8, attn_implementation="eager", rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2Model(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "norm" in name else 0.3)
    return model


def write_lumina2(data_dir: Path, layout: str = "original", *, name: str = "lumina2", seed: int = 0, **changes: Any) -> DitFiles:
    lumina, vae, gemma = make_lumina2(seed, **changes), make_vae(), gemma2_encoder()
    generator = torch.Generator().manual_seed(7)
    x, text = torch.randn(1, 16, 8, 8, generator=generator), torch.randn(1, 9, TEXT_WIDTH, generator=generator)
    settle(lumina.norm_out.linear_2, library_flow(lumina, x, text, [9], torch.tensor([0.5])), vae, 0.3611)
    tokenizer = torch.tensor(list(spiece_model()), dtype=torch.uint8)
    texts = {f"model.{key}": tensor for key, tensor in gemma.state_dict().items()}
    folder, vae_tensors = data_dir / "models", vae_to_ldm(vae.state_dict(), vae.config)
    checkpoint = folder / "Stable-diffusion" / f"{name}.safetensors"
    files = DitFiles(checkpoint=checkpoint, modules=(), transformer=lumina, vae=vae, texts={"gemma2": gemma})
    if layout == "all-in-one":
        whole = original_tensors(lumina, "model.diffusion_model.") | {f"vae.{key}": tensor for key, tensor in vae_tensors.items()}
        whole |= {f"text_encoders.gemma2_2b.transformer.{key}": tensor for key, tensor in texts.items()}
        _save(checkpoint, {**whole, "text_encoders.gemma2_2b.spiece_model": tokenizer})
        return files
    save(checkpoint, original_tensors(lumina) if layout == "original" else dict(lumina.state_dict()))
    modules = (folder / "VAE" / "ae.safetensors", folder / "text_encoder" / "gemma_2_2b_fp16.safetensors")
    save(modules[0], vae_tensors if layout == "original" else dict(vae.state_dict()))
    _save(modules[1], {**texts, "spiece_model": tokenizer})
    return DitFiles(checkpoint=checkpoint, modules=modules, transformer=lumina, vae=vae, texts={"gemma2": gemma})


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """With the types that they have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
