"""Qwen3 (Z-Image, Flux.2), and the language model of Qwen3-VL (Krea 2), as a family's text encoder: its places in files, its configuration from
shapes, its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn
from transformers import Qwen3Config

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import Component
from backend.families.file_shapes import FileShapes, read_part
from backend.families.file_tokenizers import refusing_tokenizers
from backend.gguf_tokenizer import read_gguf_tokenizer
from backend.nn.qwen3 import THETA, VL_THETA, Qwen3Shape, Qwen3TextEncoder, qwen3_config
from backend.state_dict import LoadPlan, build_empty, plan_as_named
from backend.text_processing.qwen_tokenizer import VOCAB_LENGTH, build_byte_tokenizer, build_qwen_tokenizer
from backend.text_processing.sentencepiece_file import CONTROL, UNUSED, USER_DEFINED

NAME = "qwen3"
TITLE = "Qwen3"
_PREFIXES = (
    *(f"text_encoders.qwen3_{size}.transformer.{part}" for size in ("4b", "8b", "06b") for part in ("model.", "")), "text_encoder.model.",
    "text_encoder.", "transformer.model.", "model.", "",
)  # fmt: skip
_MARKS = ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.mlp.gate_proj.weight")
VL_NAME, VL_TITLE = "qwen3_vl", "Qwen3-VL"
VL_FILE_PREFIX = "text_encoders.qwen3vl_4b.transformer.model.language_model."
_VL_PREFIXES = (
    VL_FILE_PREFIX, "text_encoders.qwen3vl_4b.transformer.model.", "text_encoder.model.language_model.", "text_encoder.language_model.",
    "model.language_model.", "language_model.", "model.", "",
)  # fmt: skip
_VL_MARK = "deepstack_merger_list."
"""In names of the picture tower, which prompts alone do not need; it tells Qwen3-VL from a Qwen3 of the same shapes."""
_VL_ARCHITECTURE = "qwen3vl"
"""In GGUF files."""
LayersRead = Callable[[int], tuple[int, ...]]
"""Number of layers -> which of them are read, counted from 1."""


def before_the_last(num_layers: int) -> tuple[int, ...]:
    return (num_layers - 1,)


def qwen3(usual_file: str, reads: LayersRead = before_the_last) -> Component:
    """A Qwen3 of any width."""
    return Component(
        name=NAME,
        title=TITLE,
        find=lambda file: find_qwen3(file.infos),
        build=lambda file, part: build_qwen3(file, part, reads),
        plan=plan_qwen3,
        width=lambda file, part: _features_width(read_qwen3_shape(file, part), reads),
        read_tokenizer=read_qwen_tokenizer,
        usual_file=usual_file,
    )


def qwen3_vl(usual_file: str, reads: LayersRead) -> Component:
    """The language model of a Qwen3-VL of any width."""
    return replace(
        qwen3(usual_file, reads),
        name=VL_NAME,
        title=VL_TITLE,
        find=find_qwen3_vl,
        build=lambda file, part: build_qwen3(file, part, reads, VL_THETA),
    )


def find_qwen3_vl(file: TensorFile) -> Sequence[Part]:
    """The first Qwen3-VL in a file: a Qwen3 with its picture tower, or under the name of one; a GGUF file, which has no tower, names its kind."""
    keys, is_told = file.infos, file.metadata.get("general.architecture") == _VL_ARCHITECTURE
    prefixes = _VL_PREFIXES if is_told or any(_VL_MARK in key for key in keys) else (VL_FILE_PREFIX,)
    return next(([Part(prefix, Layout.TRANSFORMERS, VL_NAME)] for prefix in prefixes if all(prefix + mark in keys for mark in _MARKS)), [])


def _features_width(shape: Qwen3Shape, reads: LayersRead) -> int:
    return shape.width * len(reads(shape.num_layers))


def qwen3_normed(usual_file: str) -> Component:
    """A Qwen3 of any width, read as it answers: after its last layer and norm."""
    return replace(
        qwen3(usual_file),
        build=lambda file, part: build_empty(lambda: _normed(qwen3_config(read_qwen3_shape(file, part)))),
    )


def _normed(config: Qwen3Config) -> nn.Module:
    return Qwen3TextEncoder(config, (config.num_hidden_layers,), is_normed=True)


def find_qwen3(keys: Collection[str]) -> Sequence[Part]:
    """The first Qwen3 in a file. Qwen2.5 has no norms of queries; Gemma has further norms."""
    for prefix in _PREFIXES:
        is_gemma = f"{prefix}layers.0.post_feedforward_layernorm.weight" in keys
        if all(prefix + mark in keys for mark in _MARKS) and not is_gemma:
            return [Part(prefix, Layout.TRANSFORMERS, NAME)]
    return []


def read_qwen3_shape(file: TensorFile, part: Part) -> Qwen3Shape:
    """Raises: CheckpointError if a tensor that determines the shape is missing, or has a shape that Qwen3 cannot have."""
    shapes: FileShapes = read_part(file, part, TITLE)
    vocab_length, width = shapes.find("embed_tokens.weight")
    attention = "layers.0.self_attn."
    (head_width,) = shapes.find(f"{attention}q_norm.weight", 1)
    query_width, key_width = (shapes.find(f"{attention}{name}.weight")[0] for name in ("q_proj", "k_proj"))
    if head_width % 2 or query_width % head_width or key_width % head_width or query_width % key_width:
        raise shapes.refuse(f"queries {query_width} and keys {key_width} wide in heads {head_width} wide")
    if vocab_length < VOCAB_LENGTH:
        raise CheckpointError(
            f"{file.path.name}: its Qwen3 text encoder knows {vocab_length} tokens; Qwen3 has {VOCAB_LENGTH}. It was trimmed, or belongs to another "
            "model; use a complete file."
        )
    return Qwen3Shape(
        vocab_length=vocab_length,
        width=width,
        inner_width=shapes.find("layers.0.mlp.gate_proj.weight")[0],
        num_heads=query_width // head_width,
        num_kv_heads=key_width // head_width,
        head_width=head_width,
        num_layers=shapes.count_blocks("layers."),
    )


def read_qwen_tokenizer(file: TensorFile, part: Part) -> Any:
    """The tokenizer of a GGUF file, or the published one. Raises: CheckpointError for one that is damaged."""
    num_rows = read_part(file, part, TITLE).find("embed_tokens.weight")[0]
    found = read_gguf_tokenizer(file, model="gpt2", num_rows=num_rows)
    if found is None:
        return build_qwen_tokenizer()
    count = max((number + 1 for number, kind in enumerate(found.kinds) if kind != UNUSED), default=0)  # rows behind them are padding
    with refusing_tokenizers(file):
        return build_byte_tokenizer(found.tokens[:count], found.merges, [kind in (CONTROL, USER_DEFINED) for kind in found.kinds[:count]])


def build_qwen3(file: TensorFile, part: Part, reads: LayersRead = before_the_last, theta: float = THETA) -> nn.Module:
    """Without memory."""
    config = qwen3_config(replace(read_qwen3_shape(file, part), theta=theta))
    return build_empty(lambda: cast("nn.Module", Qwen3TextEncoder(config, reads(config.num_hidden_layers))))


def plan_qwen3(encoder: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of its parameters."""
    return plan_as_named(encoder, file, lambda key: part.prefix + key)
