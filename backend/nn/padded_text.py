"""Texts of different lengths in one call of a network: shorter ones are padded, and each row says how many of its tokens count.

A family whose text and picture attend to each other without a fixed text length returns "text_lengths" (B,) with "crossattn" (B, L, D). Padding
then changes nothing, so that prompt and negative prompt can run as rows of one call. Knows no families.

Shapes: B rows, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

TEXT_LENGTHS = "text_lengths"
"""Name of the condition (B,) int64, and of the network's input."""


def pad_text(text_BLD: Tensor, length: int) -> Tensor:
    """The text with zeros behind it up to `length` tokens."""
    return functional.pad(text_BLD, (0, 0, 0, length - text_BLD.shape[1]))


def stack_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts (L, D) of any lengths as (B, longest L, D), and their lengths (B,)."""
    lengths = [len(text_LD) for text_LD in texts]
    padded = [pad_text(text_LD[None], max(lengths)) for text_LD in texts]
    return torch.cat(padded), torch.tensor(lengths, device=texts[0].device)


def read_lengths(lengths_B: Tensor | None, num_rows: int, num_tokens: int) -> list[int]:
    """How many tokens count in each row; all of them where that is not said. Waits for the device once a pass."""
    if lengths_B is None or lengths_B.is_meta:
        return [num_tokens] * num_rows
    lengths = [min(int(length), num_tokens) for length in lengths_B.tolist()]
    return lengths * num_rows if len(lengths) == 1 else lengths


def trim_text(text_BLD: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The text up to the longest row, and which of its tokens count (B, L), or None if all do.

    Reads the lengths, and so waits for the device once a pass. Rows that run alone are never masked, which lets them use the fastest attention.
    """
    lengths = read_lengths(lengths_B, text_BLD.shape[0], text_BLD.shape[1])
    longest = max(lengths)
    text_BLD = text_BLD[:, :longest]
    if lengths_B is None or min(lengths) == longest:
        return text_BLD, None
    return text_BLD, torch.arange(longest, device=text_BLD.device) < lengths_B.to(text_BLD.device)[:, None]


def attention_mask(counts_BL: Tensor | None, num_picture: int, *, text_first: bool = True) -> Tensor | None:
    """Which keys count, (B, 1, 1, L + picture tokens): the text's as `counts_BL` says, the picture's always. None if all do.

    Padding may attend to whatever it likes: nobody reads what it becomes.
    """
    if counts_BL is None:
        return None
    parts = [counts_BL, counts_BL.new_ones(counts_BL.shape[0], num_picture)]
    return torch.cat(parts if text_first else parts[::-1], dim=1)[:, None, None]
