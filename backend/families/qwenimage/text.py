"""Qwen-Image's text recipe: Qwen2.5-VL's features of the prompt in a chat about describing pictures, without those of the instruction.

With reference pictures the instruction is about editing, and the encoder sees the pictures before the prompt, at the size that the model was trained
with: a small one each from Qwen-Image-Edit-2509 on; the first Qwen-Image-Edit, which its file name tells, one of a megapixel. The negative prompt
comes with the same pictures.

Shapes: B prompts, L tokens, D width of Qwen2.5-VL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

from backend.families.family import TextEngine
from backend.families.qwen_vl_text import NAME, qwen25_vl
from backend.nn.padded_text import TEXT_LENGTHS
from backend.text_processing.chat_engine import ChatTextProcessingEngine, Template
from backend.text_processing.picture_chat_engine import PictureChatEngine, PictureTemplate
from backend.text_processing.qwen_tokenizer import build_qwen_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

SMALL_PICTURES, ONE_LARGE_PICTURE = 0, 1
"""Positions of the text engines."""
_SYSTEM, _USER, _AFTER = "<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_DESCRIBE = "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects and background:"
_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how the user's text instruction "
    "should alter or modify the image. Generate a new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate."
)
TEMPLATE = Template(before=f"{_SYSTEM}{_DESCRIBE}{_USER}", after=_AFTER, num_dropped=34, trained_length=1024)
EDIT_TEMPLATE = Template(before=f"{_SYSTEM}{_EDIT}{_USER}", after=_AFTER, num_dropped=64, trained_length=1024)
RECIPES = (
    PictureTemplate(template=EDIT_TEMPLATE, label="Picture {}: ", area_px=384 * 384),
    PictureTemplate(template=EDIT_TEMPLATE, label="", area_px=1024 * 1024),
)
"""By position of the text engine."""
EDIT_NAMES = ("edit",)
_LATER_EDIT_NAMES = ("2509", "2511", "2512", "plus")
TEXT_ENCODERS = (qwen25_vl("qwen_2.5_vl_7b_fp8_scaled.safetensors (9.4 GB)"),)


def build_text_engines(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], embeddings: EmbeddingDatabase) -> Sequence[TextEngine]:
    return [PictureChatEngine(encoders[NAME], tokenizers[NAME], TEMPLATE, recipe) for recipe in RECIPES]


def build_token_counter() -> TextEngine:
    """Qwen's tokens, without Qwen2.5-VL."""
    return ChatTextProcessingEngine(nn.Identity(), build_qwen_tokenizer(), TEMPLATE)


def encode(side: Any, prompt: Sequence[str]) -> dict[str, Tensor]:
    """ "crossattn" (B, L, D) and "text_lengths" (B,)."""
    text_BLD, lengths_B = side.run_text_engine(ONE_LARGE_PICTURE if is_first_edit(side.filename) else SMALL_PICTURES, prompt)
    return {"crossattn": text_BLD, TEXT_LENGTHS: lengths_B}


def is_first_edit(file_name: str) -> bool:
    """Whether the name is that of the first Qwen-Image-Edit or a fine-tune of it. Example: qwen_image_edit_fp8, but not qwen_image_edit_2509."""
    stem = PurePath(file_name).stem.lower()
    return any(name in stem for name in EDIT_NAMES) and not any(name in stem for name in _LATER_EDIT_NAMES)
