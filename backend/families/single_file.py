"""Writes single files of models with several parts: prefixes and names that other UIs read. Knows no families."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

VAE_PREFIX = "vae."


def join_parts(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, each under its prefix, contiguous. Memory is shared where only names change."""
    return {prefix + key: tensor.detach().contiguous() for prefix, tensors in parts.items() for key, tensor in tensors.items()}


def t5_to_file(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """T5's weights under the names in files, where the table of tokens has its own."""
    return {"shared.weight" if key == "encoder.embed_tokens.weight" else key: tensor for key, tensor in state_dict.items()}
