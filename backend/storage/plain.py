"""Weights stored in a type that layers compute in: fp32, fp16, bf16 (and integer buffers, which are never quantized)."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.storage.base import Storage


class PlainStorage(Storage):
    """Plain numbers; nothing to dequantize."""

    __slots__ = ()

    @classmethod
    def holds(cls, tensor: Tensor) -> bool:
        return True

    def dequantize(self, out_dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        return self.tensor.detach().to(out_dtype, copy=copy)

    def run_dtype(self, computation_dtype: torch.dtype) -> torch.dtype:
        return self.tensor.dtype

    def requantize(self, value: Tensor, *, seed: int) -> PlainStorage:
        return PlainStorage(value.to(self.tensor.dtype))

    def overwrite(self, value: Tensor, *, seed: int) -> None:
        """Rounds while copying on one device. Between devices it rounds first, so that fewer bytes cross."""
        rounded = value if value.device == self.device else value.to(self.tensor.dtype)
        with torch.inference_mode(self.tensor.is_inference()), torch.no_grad():
            self.tensor.copy_(rounded)
