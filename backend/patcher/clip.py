"""A model's text encoders as one network that can be placed on a device, with their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from backend import memory_management
from backend.memory.module_bytes import count_module_bytes
from backend.patcher.base import ModelPatcher


class JointTextEncoder(nn.ModuleDict):
    """Text encoders by slot name: "clip_l", "clip_g", "clip_h"."""


class ObjectDict:
    """Named objects, read by attribute or by key."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = dict(objects)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_objects"][name]
        except KeyError as error:
            raise AttributeError(f"There is no {name!r} here, only {', '.join(self.__dict__.get('_objects', {}))}.") from error

    def __getitem__(self, name: str) -> Any:
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)


class CLIP:
    """Text encoders with their tokenizers and their patcher. A clone shares the networks but has its own patches."""

    def __init__(
        self, model_dict: Mapping[str, nn.Module] | None = None, tokenizer_dict: Mapping[str, Any] | None = None, no_init: bool = False
    ) -> None:
        if no_init:
            return
        self.cond_stage_model = JointTextEncoder(dict(model_dict or {}))
        self.tokenizer = ObjectDict(tokenizer_dict or {})
        self.patcher = ModelPatcher(
            self.cond_stage_model,
            load_device=memory_management.text_encoder_device(count_module_bytes(self.cond_stage_model).total_bytes),
            offload_device=memory_management.text_encoder_offload_device(),
            current_device=next((parameter.device for parameter in self.cond_stage_model.parameters()), None),
        )

    def clone(self) -> CLIP:
        copy = CLIP(no_init=True)
        copy.patcher = self.patcher.clone()
        copy.cond_stage_model = self.cond_stage_model
        copy.tokenizer = self.tokenizer
        return copy

    def add_patches(self, *args: Any, **kwargs: Any) -> set[Any]:
        """Like `ModelPatcher.add_patches`. Names start with the encoder's: "clip_l.encoder..."."""
        return self.patcher.add_patches(*args, **kwargs)
