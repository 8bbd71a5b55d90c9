"""Finds Anima in files, with the arguments for building it. Reads names and shapes only.

Anima is the image transformer of Cosmos-Predict2 with a conditioner for text in the same file.
"""

from __future__ import annotations

from typing import Any

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.family import FoundDenoiser
from backend.families.file_shapes import ORIGINAL_PREFIXES, FileShapes, read_part
from backend.nn.anima import LATENT_CHANNELS

TITLE = "Anima"
CELL = 2
INPUTS = (LATENT_CHANNELS + 1) * CELL**2
"""The last channel says which latents are padding: none."""
CONDITIONER = "llm_adapter."
_MARKS = ("blocks.0.mlp.layer1.weight", "blocks.0.cross_attn.q_proj.weight", "x_embedder.proj.1.weight")
_CONDITIONER_HEADS = 16


def identify_anima(file: TensorFile) -> FoundDenoiser | None:
    """The Anima in the file. Raises: CheckpointError for Cosmos-Predict2 alone, and for a file that lacks what its shape is read from."""
    for prefix in ORIGINAL_PREFIXES:
        if all(prefix + mark in file.infos for mark in _MARKS):
            shapes = read_part(file, Part(prefix, Layout.LDM), TITLE)
            if not shapes.has_any(CONDITIONER):
                raise CheckpointError(
                    f"{file.path.name}: is Cosmos-Predict2, or Anima without its text conditioner ({CONDITIONER}*). This is not supported; use a "
                    "complete Anima file."
                )
            return _describe(shapes)
    return None


def _describe(shapes: FileShapes) -> FoundDenoiser:
    width, inputs = shapes.find("x_embedder.proj.1.weight")
    (head_width,) = shapes.find("blocks.0.self_attn.q_norm.weight", 1)
    if inputs != INPUTS or head_width < 12 or head_width % 4 or width % head_width:
        raise shapes.refuse(f"{inputs} inputs per token, width {width} and heads {head_width} wide")
    vocab_length, text_width = shapes.find(f"{CONDITIONER}embed.weight")
    attention = f"{CONDITIONER}blocks.0.cross_attn."
    conditioner_width, source_width = (shapes.find(f"{attention}{name}.weight")[1] for name in ("q_proj", "k_proj"))
    if conditioner_width % (2 * _CONDITIONER_HEADS) or shapes.find("blocks.0.cross_attn.k_proj.weight")[1] != text_width:
        raise shapes.refuse(f"a text conditioner {conditioner_width} wide that gives {text_width}")
    config: dict[str, Any] = {
        "num_attention_heads": width // head_width,
        "attention_head_dim": head_width,
        "num_layers": shapes.count_blocks("blocks."),
        "mlp_ratio": shapes.find("blocks.0.mlp.layer1.weight")[0] / width,
        "text_embed_dim": text_width,
        "adaln_lora_dim": shapes.find("blocks.0.adaln_modulation_self_attn.1.weight")[0],
        "source_dim": source_width,
        "conditioner_width": conditioner_width,
        "conditioner_mlp_ratio": shapes.find(f"{CONDITIONER}blocks.0.mlp.0.weight")[0] / conditioner_width,
        "conditioner_layers": shapes.count_blocks(f"{CONDITIONER}blocks."),
        "conditioner_heads": _CONDITIONER_HEADS,
        "vocab_length": vocab_length,
    }
    return FoundDenoiser(part=shapes.part, config=config, context_width=source_width)
