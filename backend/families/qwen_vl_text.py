"""Qwen2.5-VL as a family's text encoder (Qwen-Image): its places in files, its configuration from shapes, its weights.

The language model and the picture tower lie side by side: "model." and "visual.", or "model.language_model." and "model.visual.". A file without the
tower makes pictures from prompts; editing needs the tower.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import Component
from backend.families.file_shapes import read_part
from backend.families.qwen_text import read_qwen_tokenizer
from backend.nn.qwen25_vl import QwenVlShape, QwenVlTextEncoder, VisionShape
from backend.nn.qwen_vision import HEADS, MERGE
from backend.state_dict import LoadPlan, build_empty, plan_as_named
from backend.text_processing.qwen_tokenizer import VOCAB_LENGTH

NAME = "qwen25_vl"
TITLE = "Qwen2.5-VL"
HEAD_WIDTH = 128
"""Of the published models; no shape tells it."""
FILE_PREFIX = "text_encoders.qwen25_7b.transformer."
_PREFIXES = {
    f"{FILE_PREFIX}model.": f"{FILE_PREFIX}visual.",
    "text_encoder.model.language_model.": "text_encoder.model.visual.",
    "text_encoder.model.": "text_encoder.visual.",
    "model.language_model.": "model.visual.",
    "language_model.": "visual.",
    "model.": "visual.",
    "": "visual.",
}
"""Of the language model, and the picture tower's for each."""
_PATCH = "patch_embed.proj.weight"


def qwen25_vl(usual_file: str) -> Component:
    """A Qwen2.5-VL of any width."""
    return Component(
        name=NAME,
        title=TITLE,
        find=lambda file: find_qwen25_vl(file.infos),
        build=build_qwen25_vl,
        plan=plan_qwen25_vl,
        width=lambda file, part: read_shape(file, part).width,
        read_tokenizer=read_qwen_tokenizer,
        usual_file=usual_file,
    )


def find_qwen25_vl(keys: Collection[str]) -> Sequence[Part]:
    """The first Qwen2.5 in a file: a decoder with biases of queries, and without the norms of Qwen3's."""
    marks = ("embed_tokens.weight", "layers.0.self_attn.q_proj.bias", "layers.0.mlp.gate_proj.weight")
    for prefix in _PREFIXES:
        if all(prefix + mark in keys for mark in marks) and f"{prefix}layers.0.self_attn.q_norm.weight" not in keys:
            return [Part(prefix, Layout.TRANSFORMERS, NAME)]
    return []


def read_shape(file: TensorFile, part: Part) -> QwenVlShape:
    """Raises: CheckpointError if a tensor that determines the shape is missing, or has a shape that Qwen2.5-VL cannot have."""
    shapes = read_part(file, part, TITLE)
    vocab_length, width = shapes.find("embed_tokens.weight")
    query_width, key_width = (shapes.find(f"layers.0.self_attn.{name}.weight")[0] for name in ("q_proj", "k_proj"))
    head_width = HEAD_WIDTH if key_width % HEAD_WIDTH == 0 else key_width
    if head_width % 2 or query_width != width or width % head_width or width % key_width:
        raise shapes.refuse(f"queries {query_width} and keys {key_width} wide in a stream {width} wide")
    if vocab_length < VOCAB_LENGTH:
        raise CheckpointError(
            f"{file.path.name}: its Qwen2.5-VL text encoder knows {vocab_length} tokens; Qwen has {VOCAB_LENGTH}. It was trimmed, or belongs to "
            "another model; use a complete file."
        )
    return QwenVlShape(
        vocab_length=vocab_length,
        width=width,
        inner_width=shapes.find("layers.0.mlp.gate_proj.weight")[0],
        num_heads=width // head_width,
        num_kv_heads=key_width // head_width,
        num_layers=shapes.count_blocks("layers."),
        vision=_read_vision(file, part, width),
    )


def _read_vision(file: TensorFile, part: Part, out_width: int) -> VisionShape | None:
    prefix = _PREFIXES[part.prefix]
    if prefix + _PATCH not in file.infos:
        return None
    shapes = read_part(file, Part(prefix, part.layout), f"the picture tower of {TITLE}")
    width, channels, frames, patch_px, patch_columns = shapes.find(_PATCH, 5)
    merged = shapes.find("merger.mlp.0.weight")[1]
    if channels != 3 or patch_px != patch_columns or width % (4 * HEADS) or merged != MERGE**2 * width:
        raise shapes.refuse(f"{channels} colors, patches of {patch_px}x{patch_columns} and tokens {width} wide, {merged} when merged")
    if shapes.find("merger.mlp.2.weight")[0] != out_width:
        raise shapes.refuse(f"tokens for a language model {shapes.find('merger.mlp.2.weight')[0]} wide next to one {out_width} wide")
    return VisionShape(
        width=width,
        inner_width=shapes.find("blocks.0.mlp.gate_proj.weight")[0],
        num_blocks=shapes.count_blocks("blocks."),
        patch_px=patch_px,
        frames=frames,
    )


def build_qwen25_vl(file: TensorFile, part: Part) -> nn.Module:
    """Without memory."""
    shape = read_shape(file, part)
    return build_empty(lambda: QwenVlTextEncoder(shape))


def plan_qwen25_vl(encoder: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of its parameters."""
    return plan_as_named(encoder, file, lambda key: name_in_file(key, part.prefix))


def name_in_file(key: str, prefix: str) -> str:
    """The name of one of our weights in a file whose language model has this prefix."""
    return _PREFIXES[prefix] + key.removeprefix("visual.") if key.startswith("visual.") else prefix + key
