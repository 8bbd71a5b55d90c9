"""Tiny random Anima networks from diffusers, Qwen3 from transformers, and checkpoints of them, with formulas of this file alone for the original
layout.

The library resizes its mask of padding with torchvision, which is not installed; `without_torchvision` stands in for that one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor, nn
from torch.nn import functional

from tests.support.dit_checkpoints import DitFiles, TextFile, write_dit
from tests.support.flux_networks import make_random
from tests.support.kept import kept
from tests.support.qwenimage_networks import make_qwen_vae, settle, wan_tensors
from tests.support.zimage_networks import qwen3_encoder

SOURCE_WIDTH, TEXT_WIDTH, WIDTH = 32, 24, 48
LEAST_TEXT = 512
CONFIG: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 3,
    "mlp_ratio": 4.0,
    "text_embed_dim": TEXT_WIDTH,
    "adaln_lora_dim": 8,
    "source_dim": SOURCE_WIDTH,
    "conditioner_width": 64,
    "conditioner_mlp_ratio": 2.0,
    "conditioner_layers": 2,
    "conditioner_heads": 16,
    "vocab_length": 32128,
}
PREFIX = "text_encoders.qwen3_06b.transformer."


class LibraryAnima(nn.Module):
    """The library's two networks, which are one in files."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        config = {**CONFIG, **changes}
        self.transformer = CosmosTransformer3DModel(
            in_channels=16, out_channels=16, rope_scale=(1.0, 4.0, 4.0), extra_pos_embed_type=None,
            num_attention_heads=config["num_attention_heads"], attention_head_dim=config["attention_head_dim"], num_layers=config["num_layers"],
            mlp_ratio=config["mlp_ratio"], text_embed_dim=config["text_embed_dim"], adaln_lora_dim=config["adaln_lora_dim"],
        )  # fmt: skip
        self.text_conditioner = AnimaTextConditioner(
            source_dim=config["source_dim"], target_dim=config["text_embed_dim"], model_dim=config["conditioner_width"],
            num_layers=config["conditioner_layers"], num_attention_heads=config["conditioner_heads"], mlp_ratio=config["conditioner_mlp_ratio"],
        )  # fmt: skip

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Our names: the transformer's own, and the conditioner's below it."""
        return {key.removeprefix("transformer."): tensor for key, tensor in super().state_dict(*args, **kwargs).items()}


@kept
def make_anima(seed: int = 0, **changes: Any) -> LibraryAnima:
    return make_random(lambda: LibraryAnima(**changes), seed)  # type: ignore[no-any-return]


def original_tensors(network: Any, prefix: str = "") -> dict[str, Tensor]:
    """Its weights in the original layout."""
    made = {}
    for key, tensor in network.state_dict().items():
        name = key
        if key.startswith("text_conditioner."):
            made[prefix + key.replace("text_conditioner.", "llm_adapter.")] = tensor
            continue
        for ours, original in (
            ("patch_embed.proj", "x_embedder.proj.1"), ("time_embed.t_embedder", "t_embedder.1"), ("time_embed.norm", "t_embedding_norm"),
            ("norm_out.linear_1", "final_layer.adaln_modulation.1"), ("norm_out.linear_2", "final_layer.adaln_modulation.2"),
            ("proj_out", "final_layer.linear"), ("transformer_blocks.", "blocks."), (".norm1.linear_", ".adaln_modulation_self_attn."),
            (".norm2.linear_", ".adaln_modulation_cross_attn."), (".norm3.linear_", ".adaln_modulation_mlp."), (".attn1.", ".self_attn."),
            (".attn2.", ".cross_attn."), (".to_q.", ".q_proj."), (".to_k.", ".k_proj."), (".to_v.", ".v_proj."), (".to_out.0.", ".output_proj."),
            (".norm_q.", ".q_norm."), (".norm_k.", ".k_norm."), (".ff.net.0.proj.", ".mlp.layer1."), (".ff.net.2.", ".mlp.layer2."),
        ):  # fmt: skip
            name = name.replace(ours, original)
        made[prefix + name] = tensor
    return made


@contextmanager
def without_torchvision() -> Iterator[None]:
    """For the length of the block, the library's mask of padding is resized by torch."""
    missing = object()
    before = getattr(transformer_cosmos, "transforms", missing)
    resize = SimpleNamespace(resize=lambda mask, size, interpolation: functional.interpolate(mask, size=size, mode=interpolation))
    transformer_cosmos.transforms = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    try:
        yield
    finally:
        if before is missing:
            del transformer_cosmos.transforms
        else:
            transformer_cosmos.transforms = before


def library_flow(network: Any, x: Tensor, rows: dict[str, Tensor], times: Tensor) -> Tensor:
    """noise - x0 of latents (B, 16, H, W) with even sides."""
    source_mask, own_mask = (
        torch.arange(part.shape[1])[None] < lengths[:, None]
        for part, lengths in ((rows["context"], rows["text_lengths"]), (rows["second_ids"], rows["second_lengths"]))
    )
    text = network.text_conditioner(rows["context"], rows["second_ids"], target_attention_mask=own_mask, source_attention_mask=source_mask)
    mask = torch.zeros(1, 1, *x.shape[2:])
    with without_torchvision():
        flow: Tensor = network.transformer(x.unsqueeze(2), times, text, padding_mask=mask, return_dict=False)[0]
    return flow.squeeze(2)


@torch.no_grad()
def write_anima(data_dir: Path, layout: str = "original", *, name: str = "anima", seed: int = 0, **changes: Any) -> DitFiles:
    """Diffusers keeps the networks in files of their own; a file of both has the original layout."""
    network, vae, qwen = make_anima(seed, **changes), make_qwen_vae(), qwen3_encoder(width=SOURCE_WIDTH)
    generator = torch.Generator().manual_seed(7)
    rows = {
        "context": torch.randn(1, 9, SOURCE_WIDTH, generator=generator), "text_lengths": torch.tensor([9]),
        "second_ids": torch.randint(0, 32128, (1, 12), generator=generator), "second_lengths": torch.tensor([12]),
    }  # fmt: skip
    flow = library_flow(network, torch.randn(1, 16, 8, 8, generator=generator), rows, torch.tensor([0.5]))
    settle(network.transformer.proj_out, flow, vae)
    tensors = {f"model.{key}": tensor for key, tensor in qwen.state_dict().items()}
    texts = {"qwen3": TextFile(network=qwen, tensors=tensors, file_name="qwen_3_06b_base.safetensors", prefix=PREFIX)}
    return write_dit(
        data_dir, layout, name=name, transformer=network, original=original_tensors(network), vae=vae, texts=texts, original_vae=wan_tensors(vae),
        vae_name="qwen_image_vae",
    )  # fmt: skip
