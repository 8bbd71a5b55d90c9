"""T5-XXL as a family's text encoder (Flux.1, SD3, Chroma): its places in files, its configuration from shapes, its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

from torch import nn

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import Component, FoundDenoiser
from backend.families.file_tokenizers import is_gguf, read_gguf_pieces, refusing_tokenizers
from backend.nn.t5 import T5Shape, T5TextEncoder, t5_config
from backend.state_dict import LoadPlan, build_empty, plan_as_named
from backend.text_processing.t5_tokenizer import VOCAB_LENGTH, build_t5_tokenizer

NAME = "t5xxl"
_PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "t5xxl.transformer.", "t5xxl.", "text_encoder_3.", "text_encoder_2.")
_PREFIXES_ALONE = ("transformer.", "")
_BLOCK = "encoder.block.0.layer.0.SelfAttention."
_TABLES = ("shared.weight", "encoder.embed_tokens.weight")
_UMT5_BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
"""UMT5 has a position bias in each block, T5 in the first."""


def t5xxl(takes: Callable[[TensorFile, Part, FoundDenoiser], bool]) -> Component:
    """The encoder of T5 v1.1, of any width."""
    return Component(
        name=NAME,
        title="T5-XXL",
        find=lambda file: find_t5(file.infos),
        takes=takes,
        build=build_t5,
        plan=plan_t5,
        width=lambda file, part: read_t5_shape(file, part).width,
        read_tokenizer=read_t5_tokenizer,
        usual_file="t5xxl_fp16.safetensors (9.5 GB)",
    )


def find_t5(keys: Collection[str]) -> Sequence[Part]:
    """All T5 encoders in a file, without UMT5, which has other tokens."""
    return [
        Part(prefix, Layout.TRANSFORMERS, NAME)
        for prefix in (*_PREFIXES, *_PREFIXES_ALONE)
        if f"{prefix}{_BLOCK}q.weight" in keys and f"{prefix}{_UMT5_BIAS}" not in keys
    ]


def read_t5_shape(file: TensorFile, part: Part) -> T5Shape:
    """Raises: CheckpointError if a tensor that determines the shape is missing, or has a shape that T5 cannot have."""
    vocab_length, width = _shape(file, part, next((name for name in _TABLES if part.prefix + name in file.infos), _TABLES[0]))
    inner_width, _ = _shape(file, part, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    attention_width, _ = _shape(file, part, f"{_BLOCK}q.weight")
    num_buckets, num_heads = _shape(file, part, f"{_BLOCK}relative_attention_bias.weight")
    if not num_heads or attention_width % num_heads or num_buckets < 4 or num_buckets % 4:
        raise CheckpointError(
            f"{file.path.name}: its T5 text encoder has a position bias of {num_buckets}x{num_heads} with attention {attention_width} wide, which no "
            "T5 has. The file is damaged, or a mix of two models; use another file."
        )
    if vocab_length < VOCAB_LENGTH:
        raise CheckpointError(
            f"{file.path.name}: its T5 text encoder knows {vocab_length} tokens; T5 has {VOCAB_LENGTH}. "
            "It was trimmed, or belongs to another model; use t5xxl_fp16.safetensors or another complete file."
        )
    return T5Shape(
        vocab_length=vocab_length,
        width=width,
        inner_width=inner_width,
        num_heads=num_heads,
        head_width=attention_width // num_heads,
        num_layers=_count_blocks(file.infos, f"{part.prefix}encoder.block."),
        num_buckets=num_buckets,
    )


def read_t5_tokenizer(file: TensorFile, part: Part) -> Any:
    """The tokenizer of a GGUF file, or the published one. Raises: CheckpointError for one that is damaged."""
    pieces = read_gguf_pieces(file, "t5", read_t5_shape(file, part).vocab_length) if is_gguf(file) else None
    if pieces is None:
        return build_t5_tokenizer()
    with refusing_tokenizers(file):
        return build_t5_tokenizer(pieces)


def _shape(file: TensorFile, part: Part, name: str) -> tuple[int, int]:
    info = file.infos.get(part.prefix + name)
    if info is None:
        raise CheckpointError(
            f"{file.path.name}: its T5 text encoder lacks {part.prefix}{name}. The file is incomplete, or a T5 v1.0, which no picture model "
            "uses. Download it again, or use t5xxl_fp16.safetensors."
        )
    if len(info.shape) != 2 or not all(info.shape):
        raise CheckpointError(
            f"{file.path.name}: {part.prefix}{name} has the shape {'x'.join(map(str, info.shape)) or 'of a number'}, but a T5 text encoder has a "
            "matrix there. The file is damaged; use another one."
        )
    return info.shape[0], info.shape[1]


def _count_blocks(keys: Collection[str], start: str) -> int:
    """Number of consecutive blocks, from 0."""
    numbers = {key[len(start) :].partition(".")[0] for key in keys if key.startswith(start)}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


def build_t5(file: TensorFile, part: Part) -> nn.Module:
    """Without memory."""
    config = t5_config(read_t5_shape(file, part))
    return build_empty(lambda: cast("nn.Module", T5TextEncoder(config)))


def plan_t5(encoder: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of its parameters. Files have the token table under either of two names, or both."""
    table = next((name for name in _TABLES if part.prefix + name in file.infos), _TABLES[0])
    return plan_as_named(encoder, file, lambda key: part.prefix + (table if key in _TABLES else key))
