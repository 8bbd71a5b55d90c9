"""Encodes prompts about pictures with a language model that sees them (Qwen2.5-VL): the pictures' tokens stand in the template before the prompt.

Shapes: L tokens, D encoder width, H W rows and columns of a picture's pixels. Must not know model families: templates and sizes are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backend.nn.qwen25_vl import ShownPicture
from backend.nn.qwen_vision import PreparedPicture, prepare_picture
from backend.text_processing.chat_engine import ChatTextProcessingEngine, Template

VISION_START, PLACEHOLDER, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


class NoVisionError(ValueError):
    """The text encoder was shown a picture, but its file has no picture tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureTemplate:
    """The template of prompts with pictures, what stands before each picture ("{}" is its number, from 1), and the area at which it is shown."""

    template: Template
    label: str
    area_px: int


class PictureChatEngine(ChatTextProcessingEngine):
    """Callable: prompts in, as ChatTextProcessingEngine. The encoder sees the list's `pictures`, (H, W, 3) uint8 RGB each, before every prompt.

    Without pictures the plain template applies.
    """

    def __init__(self, text_encoder: nn.Module, tokenizer: Any, template: Template, with_pictures: PictureTemplate) -> None:
        super().__init__(text_encoder, tokenizer, template)
        self.with_pictures = with_pictures
        self._shown: Sequence[PreparedPicture] = ()

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Raises: PromptTooLongError; NoVisionError for pictures that the encoder cannot see."""
        self._shown = self._prepare(getattr(texts, "pictures", ()))
        try:
            return super().__call__(texts)
        finally:
            self._shown = ()

    def _prepare(self, pictures: Sequence[np.ndarray]) -> Sequence[PreparedPicture]:
        tower: Any = getattr(self.text_encoder, "visual", None)
        if pictures and tower is None:
            raise NoVisionError(
                "The text encoder is to see reference pictures, but its file has no picture tower (visual.*). Choose a Qwen2.5-VL file with one, "
                "such as qwen_2.5_vl_7b.safetensors, under 'VAE / Text Encoder'."
            )
        return [prepare_picture(picture, self.with_pictures.area_px, tower.config) for picture in pictures]

    @property
    def num_dropped(self) -> int:
        return self.with_pictures.template.num_dropped if self._shown else self.template.num_dropped

    def _frame(self) -> tuple[list[int], list[int]]:
        if not self._shown:
            return super()._frame()
        parts = [
            f"{self.with_pictures.label.format(number)}{VISION_START}{PLACEHOLDER * shown.num_tokens}{VISION_END}"
            for number, shown in enumerate(self._shown, 1)
        ]
        template = self.with_pictures.template
        before, after = self.tokenize([template.before + "".join(parts), template.after])
        return before, after

    def _run(self, tokens: list[int], num_pads: int) -> Tensor:
        if not self._shown:
            return super()._run(tokens, num_pads)
        encoder: Any = self.text_encoder
        (placeholder,) = self.tokenize([PLACEHOLDER])[0]
        firsts = [index for index, token in enumerate(tokens) if token == placeholder and (index == 0 or tokens[index - 1] != placeholder)]
        shown = [ShownPicture(first, picture) for first, picture in zip(firsts, self._shown)]  # a prompt's own placeholders come after these
        ids_1L = torch.tensor([tokens], device=encoder.get_input_embeddings().weight.device)
        return encoder(ids_1L, shown)  # type: ignore[no-any-return]
