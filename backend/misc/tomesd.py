"""Token merging: self-attention on fewer tokens, by merging those that are most alike, under the name that extensions import (`TomePatcher`).

Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion" (2023), sections 3 and 4: one token of each 2 x 2 cell is a destination, chosen
at random in each step; the share `ratio` of all tokens most like a destination is averaged into it, and gets its answer back. Only blocks at
the latents' own size merge.

Shapes: B rows, L tokens, R merged tokens, S sources, T destinations, D width of a token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CELL = 2
_FACT = "token merging"


@dataclass(frozen=True, slots=True, eq=False)
class Matching:
    """Which tokens merge: places of `sources` (S,) and `destinations` (T,); which sources are `kept` (B, S - R), which are `merged` (B, R), and
    `into` which destinations (B, R)."""

    num_tokens: int
    sources: Tensor
    destinations: Tensor
    kept: Tensor
    merged: Tensor
    into: Tensor

    def merge(self, tokens_BLD: Tensor) -> Tensor:
        """(B, S - R + T, D): what is kept, then destinations as means of themselves and what merged into them."""
        sources, destinations = tokens_BLD[:, self.sources], tokens_BLD[:, self.destinations]
        width = tokens_BLD.shape[-1]
        joined = destinations.scatter_reduce(1, _wide(self.into, width), sources.gather(1, _wide(self.merged, width)), "mean")
        return torch.cat([sources.gather(1, _wide(self.kept, width)), joined], dim=1)

    def unmerge(self, tokens_BMD: Tensor) -> Tensor:
        """(B, L, D): every merged token gets its destination's value."""
        num_kept, width = self.kept.shape[1], tokens_BMD.shape[-1]
        kept, destinations = tokens_BMD[:, :num_kept], tokens_BMD[:, num_kept:]
        sources = tokens_BMD.new_empty(tokens_BMD.shape[0], len(self.sources), width)
        sources.scatter_(1, _wide(self.kept, width), kept)
        sources.scatter_(1, _wide(self.merged, width), destinations.gather(1, _wide(self.into, width)))
        result = tokens_BMD.new_empty(tokens_BMD.shape[0], self.num_tokens, width)
        result[:, self.sources], result[:, self.destinations] = sources, destinations
        return result


def _wide(index: Tensor, width: int) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, width)


def match_tokens(tokens_BLD: Tensor, height: int, width: int, ratio: float, draw: torch.Generator) -> Matching | None:
    """The matching for L = `height` x `width` tokens; None if nothing merges. `draw` is on the host, so that all devices choose alike."""
    cells = height // CELL, width // CELL
    num_merged = min(int(height * width * ratio), height * width - cells[0] * cells[1])
    if num_merged <= 0 or 0 in cells:
        return None
    corner = torch.randint(CELL * CELL, cells, generator=draw)
    rows = torch.arange(cells[0])[:, None] * CELL + corner // CELL
    columns = torch.arange(cells[1])[None, :] * CELL + corner % CELL
    is_destination = torch.zeros(height * width, dtype=torch.bool)
    is_destination[(rows * width + columns).flatten()] = True
    destinations = is_destination.nonzero()[:, 0].to(tokens_BLD.device)
    sources = (~is_destination).nonzero()[:, 0].to(tokens_BLD.device)
    unit = tokens_BLD / tokens_BLD.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    likeness_BS, nearest_BS = (unit[:, sources] @ unit[:, destinations].transpose(-1, -2)).max(dim=-1)
    order = likeness_BS.argsort(dim=-1, descending=True)
    merged = order[:, :num_merged]
    return Matching(height * width, sources, destinations, order[:, num_merged:], merged, nearest_BS.gather(1, merged))


class TomePatcher:
    """Adds token merging to a patcher's UNet."""

    def patch(self, model: Any, ratio: float) -> Any:
        """A clone of the patcher whose outer self-attentions merge the share `ratio` (0..1) of their tokens."""
        clone = model.clone()
        clone.set_model_attn1_patch(_merging(ratio))
        clone.set_model_attn1_output_patch(_unmerge)
        return clone


def _merging(ratio: float) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def merge(normed: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        height, width = extra["original_shape"][-2:]
        if height * width != normed.shape[1] or context.shape[1] != normed.shape[1]:
            return normed, context, value
        seed = zlib.crc32(f"{float(extra['sigmas'][0])} {extra['block']} {extra['block_index']}".encode())
        matching = match_tokens(normed, height, width, ratio, torch.Generator().manual_seed(seed))
        if matching is None:
            return normed, context, value
        extra[_FACT] = matching
        merged = matching.merge(normed)
        return merged, merged if context is normed else matching.merge(context), merged if value is normed else matching.merge(value)

    return merge


def _unmerge(output: Tensor, extra: dict[str, Any]) -> Tensor:
    """`extra` is one block's, the same in both hooks."""
    matching: Matching | None = extra.pop(_FACT, None)
    return output if matching is None else matching.unmerge(output)
