"""Flux.1's text recipe: T5's features are the text; CLIP-L's pooled vector of the first 75 tokens steers the modulation.

Shapes: B prompts, L tokens, D width of T5, P width of CLIP-L.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Part
from backend.families.family import FoundDenoiser, TextEngine
from backend.families.t5_text import t5xxl
from backend.families.unet_family import clip_l, is_slot, text_width
from backend.text_processing.classic_engine import ClassicTextProcessingEngine
from backend.text_processing.t5_engine import T5TextProcessingEngine
from backend.text_processing.t5_tokenizer import build_t5_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

T5, CLIP_L = 0, 1
"""Positions of the text engines; the token counter at the prompt box uses the first."""


def _takes_clip(file: TensorFile, part: Part, found: FoundDenoiser) -> bool:
    """Takes a CLIP-L with the width of the network's pooled vector."""
    wanted = found.config.get("pooled_projection_dim")
    return is_slot("clip_l")(file, part, found) and (wanted is None or text_width(file, part) == wanted)


TEXT_ENCODERS = (
    # Only CLIP's vector is used, not its tokens: it adds nothing to the text's width.
    replace(clip_l(_takes_clip), width=lambda file, part: 0, usual_file="clip_l.safetensors (0.25 GB)"),
    t5xxl(lambda file, part, found: True),
)


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    """T5, then CLIP-L."""
    clip = ClassicTextProcessingEngine(
        encoders["clip_l"], tokenizers["clip_l"], embedding_key="clip_l", embeddings=embeddings, return_pooled=True
    )  # fmt: skip
    return [T5TextProcessingEngine(encoders["t5xxl"], tokenizers["t5xxl"]), clip]


def build_token_counter() -> TextEngine:
    """T5's tokens, without T5."""
    return T5TextProcessingEngine(nn.Identity(), build_t5_tokenizer())


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "vector" (B, P)."""
    _, pooled_BP = side.run_text_engine(CLIP_L, prompt)
    return {"crossattn": side.run_text_engine(T5, prompt), "vector": pooled_BP}
