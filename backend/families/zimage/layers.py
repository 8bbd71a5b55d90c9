"""Z-Image's layers before its blocks, and its blocks, with diffusers' modules. Shared by the denoiser and its ControlNets.

Places: text (1, 0, 0), (2, 0, 0) ..; the picture's (n + 1, row, column) behind n padded text tokens, so that rows with longer texts have other
rotations.

Shapes: B rows, C latent channels, H W latent rows and columns, L tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.families.one_stream import COSINES, IMAGE, MASK, MODULATION, SINES, TEXT, BlockParts, run_parts
from backend.families.zimage.identify import CELL
from backend.nn.padded_text import TEXT_LENGTHS, read_lengths
from backend.nn.program import NamedLayers
from backend.nn.stream_layers import Rope, rotations

PATCH = "2-1"
MULTIPLE = 32
"""Numbers of tokens are multiples of this, in training too."""


def parts_of(block: Any) -> BlockParts:
    """A block's layers in diffusers' class."""
    mlp = block.feed_forward
    return BlockParts(
        attention=block.attention, norm_before=block.attention_norm1, norm_behind=block.attention_norm2, up=mlp.w3, gate=mlp.w1, down=mlp.w2,
        mlp_norm_before=block.ffn_norm1, mlp_norm_behind=block.ffn_norm2, modulate=block.adaLN_modulation if block.modulation else None,
    )  # fmt: skip


def run_block(block: Any, tokens_BLD: Tensor, modulation_BD: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
    """The tokens after a block. Its modulation, if any, has the network's dtype."""
    return run_parts(parts_of(block), tokens_BLD, modulation_BD, rope, mask)


@dataclass(frozen=True, eq=False)
class ZImageEmbedding:
    """The layers before the blocks, and the learned tokens of padding, which are the network's own."""

    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return tuple((name, self.network.get_submodule(name)) for name in (f"all_x_embedder.{PATCH}", "cap_embedder", "t_embedder", "pads"))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)

    def modulate(self, times_B: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, 256) of times 0..1, 1 for a clean picture."""
        embed = self.network.t_embedder
        features = embed.timestep_embedding(times_B.float() * self.network.t_scale, embed.frequency_embedding_size)
        return embed.mlp(features.to(dtype))  # type: ignore[no-any-return]


def start_tensors(embedding: ZImageEmbedding, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the segments start from, of a program's rows."""
    network, x_BCHW, context_BLD = embedding.network, rows["x"], rows["context"]
    num_rows, (height, width) = x_BCHW.shape[0], x_BCHW.shape[2:]
    lengths = read_lengths(rows.get(TEXT_LENGTHS), num_rows, context_BLD.shape[1])
    padded = [rounded(length) for length in lengths]
    image_BLD = pad_tokens(network.all_x_embedder[PATCH](pack(x_BCHW)), network.pads.picture)
    text_BLD = network.cap_embedder(context_BLD[:, : max(lengths)]).expand(num_rows, -1, -1)
    text_BLD = _pad_rows(pad_tokens(text_BLD, network.pads.text), lengths, network.pads.text)
    if x_BCHW.dtype == torch.float16:
        image_BLD, text_BLD = image_BLD.float(), text_BLD.float()
    cells = (-(-height // CELL), -(-width // CELL))
    distinct = padded if len(set(padded)) > 1 else padded[:1]
    places = torch.stack([_places(*cells, image_BLD.shape[1], text_BLD.shape[1], count) for count in distinct]).to(x_BCHW.device)
    cosines, sines = rotations(places, network.axes_dims, network.rope_theta)
    modulation_BD = embedding.modulate(rows["timesteps"], x_BCHW.dtype)
    tensors = {IMAGE: image_BLD, TEXT: text_BLD, MODULATION: modulation_BD, COSINES: cosines, SINES: sines}
    if min(padded) < text_BLD.shape[1]:
        tensors[MASK] = _mask(padded, image_BLD.shape[1], text_BLD.shape[1]).to(x_BCHW.device)
    return tensors


def pack(x_BCHW: Tensor) -> Tensor:
    """Latents as tokens of 2x2, (B, H/2 * W/2, 4 C), channels last. Odd sides are padded from the opposite edge."""
    if x_BCHW.shape[2] % CELL or x_BCHW.shape[3] % CELL:
        x_BCHW = functional.pad(x_BCHW, (0, x_BCHW.shape[3] % CELL, 0, x_BCHW.shape[2] % CELL), mode="circular")
    batch, channels, height, width = x_BCHW.shape
    cells = x_BCHW.reshape(batch, channels, height // CELL, CELL, width // CELL, CELL)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, channels * CELL**2)


def unpack(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """The inverse: latents (B, C, height, width)."""
    rows, columns = -(-height // CELL), -(-width // CELL)
    cells = tokens_BLD.reshape(tokens_BLD.shape[0], rows, columns, CELL, CELL, -1)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(tokens_BLD.shape[0], -1, rows * CELL, columns * CELL)[:, :, :height, :width]


def rounded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


def pad_tokens(tokens_BLD: Tensor, pad_1D: Tensor) -> Tensor:
    """Learned tokens behind the others, up to a multiple of 32."""
    missing = rounded(tokens_BLD.shape[1]) - tokens_BLD.shape[1]
    return torch.cat([tokens_BLD, pad_1D.to(tokens_BLD).expand(tokens_BLD.shape[0], missing, -1)], dim=1) if missing else tokens_BLD


def _pad_rows(text_BLD: Tensor, lengths: Sequence[int], pad_1D: Tensor) -> Tensor:
    """Learned tokens in the place of what does not count in shorter rows."""
    if min(lengths) == max(lengths):
        return text_BLD
    counts_BL = torch.arange(text_BLD.shape[1])[None] < torch.tensor(lengths)[:, None]
    return torch.where(counts_BL.to(text_BLD.device)[..., None], text_BLD, pad_1D.to(text_BLD))


def _mask(padded: Sequence[int], num_picture: int, num_text: int) -> Tensor:
    """Which keys count, (B, 1, 1, L): those behind a row's own padding do not."""
    counts_BL = torch.arange(num_picture + num_text)[None] < num_picture + torch.tensor(padded)[:, None]
    return counts_BL[:, None, None]


def _places(rows: int, columns: int, num_picture: int, num_text: int, padded_text: int) -> Tensor:
    """Places (L, 3) of the picture's tokens, its padding (all 0) and the text, in the order of joined tokens."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1).reshape(-1, 2)
    picture = functional.pad(functional.pad(grid, (1, 0), value=padded_text + 1), (0, 0, 0, num_picture - len(grid)))
    return torch.cat([picture, functional.pad(torch.arange(1, num_text + 1)[:, None], (0, 2))])
