"""Gemma2 as a family's text encoder (Lumina2): its places in files, its configuration from shapes, its weights and its tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import Component
from backend.families.file_shapes import read_part
from backend.families.file_tokenizers import is_gguf, read_gguf_pieces, refusing_tokenizers
from backend.nn.gemma2 import Gemma2Shape, Gemma2TextEncoder, gemma2_config
from backend.state_dict import LoadPlan, build_empty, plan_as_named
from backend.text_processing.gemma_tokenizer import build_gemma_tokenizer
from backend.text_processing.sentencepiece_file import read_sentencepiece, write_sentencepiece

NAME = "gemma2"
TITLE = "Gemma2"
HEAD_WIDTH = 256
"""Of Gemma2 2B and 9B; no shape tells it."""
MAX_TOKENIZER_BYTES = 64 * 2**20
_PREFIXES = (
    "text_encoders.gemma2_2b.transformer.model.", "text_encoders.gemma2_2b.transformer.", "text_encoder.model.", "text_encoder.",
    "transformer.model.", "model.", "",
)  # fmt: skip
TOKENIZER = "spiece_model"


def gemma2(usual_file: str) -> Component:
    """A Gemma2 of any width."""
    return Component(
        name=NAME,
        title=TITLE,
        find=lambda file: find_gemma2(file.infos),
        build=build_gemma2,
        plan=plan_gemma2,
        width=lambda file, part: read_gemma2_shape(file, part).width,
        read_tokenizer=read_gemma_tokenizer,
        usual_file=usual_file,
    )


def find_gemma2(keys: Collection[str]) -> Sequence[Part]:
    """The first Gemma2 in a file. Gemma3 has norms of queries."""
    marks = ("embed_tokens.weight", "layers.0.post_feedforward_layernorm.weight")
    for prefix in _PREFIXES:
        if all(prefix + mark in keys for mark in marks) and f"{prefix}layers.0.self_attn.q_norm.weight" not in keys:
            return [Part(prefix, Layout.TRANSFORMERS, NAME)]
    return []


def read_gemma2_shape(file: TensorFile, part: Part) -> Gemma2Shape:
    """Raises: CheckpointError if a tensor that determines the shape is missing, or has a shape that Gemma2 cannot have."""
    shapes = read_part(file, part, TITLE)
    vocab_length, width = shapes.find("embed_tokens.weight")
    query_width, key_width = (shapes.find(f"layers.0.self_attn.{name}.weight")[0] for name in ("q_proj", "k_proj"))
    head_width = HEAD_WIDTH if key_width % HEAD_WIDTH == 0 else key_width
    if head_width % 2 or query_width % head_width or query_width % key_width:
        raise shapes.refuse(f"queries {query_width} and keys {key_width} wide")
    return Gemma2Shape(
        vocab_length=vocab_length,
        width=width,
        inner_width=shapes.find("layers.0.mlp.gate_proj.weight")[0],
        num_heads=query_width // head_width,
        num_kv_heads=key_width // head_width,
        head_width=head_width,
        num_layers=shapes.count_blocks("layers."),
    )


def build_gemma2(file: TensorFile, part: Part) -> nn.Module:
    """Without memory, but with the bytes of its tokenizer, so that a saved model has them."""
    config = gemma2_config(read_gemma2_shape(file, part))
    encoder = build_empty(lambda: Gemma2TextEncoder(config))
    encoder.tokenizer_bytes = read_tokenizer_bytes(file, part)
    return encoder


def plan_gemma2(encoder: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of its parameters."""
    return plan_as_named(encoder, file, lambda key: part.prefix + key)


def read_tokenizer_bytes(file: TensorFile, part: Part) -> Tensor:
    """The SentencePiece model in the file, uint8. Raises: CheckpointError if there is none."""
    pieces = read_gguf_pieces(file, "llama", read_part(file, part, TITLE).find("embed_tokens.weight")[0]) if is_gguf(file) else None
    if pieces is not None:
        return torch.frombuffer(bytearray(write_sentencepiece(pieces)), dtype=torch.uint8)
    key = next((key for key in file.infos if key.rpartition(".")[2] == TOKENIZER), None)
    if key is None:
        raise CheckpointError(
            f"{file.path.name}: its Gemma2 text encoder comes without its tokenizer ({TOKENIZER}), and none is shipped. Use a file with both, as "
            "gemma_2_2b_fp16.safetensors for ComfyUI, or a GGUF file made by llama.cpp."
        )
    info = file.infos[key]
    if info.dtype is not torch.uint8 or len(info.shape) != 1 or not 0 < info.shape[0] <= MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{file.path.name}: {key} is no tokenizer. The file is damaged; download it again.")
    return file.read(key)


def read_gemma_tokenizer(file: TensorFile, part: Part) -> Any:
    """The tokenizer in the file. Raises: CheckpointError if there is none, or none that can be read."""
    data = read_tokenizer_bytes(file, part).numpy().tobytes()
    with refusing_tokenizers(file):
        return build_gemma_tokenizer(read_sentencepiece(data))
