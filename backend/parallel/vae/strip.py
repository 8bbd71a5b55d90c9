"""One strip's forward: runs a strip of rows through the decoder, waiting for other strips only by yielding (see `backend.nn.tiles`).

Every 3x3 convolution needs one row from each neighbor, every group norm the statistics of the whole picture. Nearly every convolution here
follows a norm, so one exchange carries both (`backend.nn.tile_layers`). Never writes to modules: strips on one device share them.

Shapes: 1 one picture, C channels, H rows of this strip, W columns, L tokens of this strip, D = C.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from backend.attention import AttentionProcessorForge, attention_function
from backend.nn.tile_layers import convolve_padded, fetch_edges, finish_norm, finish_norm_padded, gather_keys_and_values, post_norm, reach_of_same
from backend.nn.tiles import Cut, Peers, Swaps, Tile
from backend.parallel.vae.layers import StripNetwork


class DecoderStrip:
    """Decodes one strip. `rows`: how many latent rows each strip has."""

    def __init__(self, network: StripNetwork, rows: Sequence[int], peers: Peers) -> None:
        self._network = network
        self._tile = Tile(peers, Cut.of_rows(rows))

    def decode(self, latent_1CHW: Tensor) -> Swaps[Tensor]:
        """The strip's picture rows, from its latent rows plus one row from each neighbor."""
        network = self._network
        x = self._conv_in(latent_1CHW)
        for resnet, attention in _interleave(network.mid_resnets, network.mid_attentions):
            x = yield from self._resnet(resnet, x)
            if attention is not None:
                x = yield from self._attention(attention, x)
        for block in network.up_blocks:
            for resnet in block.resnets:
                x = yield from self._resnet(resnet, x)
            if block.upsample_conv is not None:
                above, below = yield from fetch_edges(x, self._tile, reach_of_same)
                padded = _double_padded(x, above, below)
                del x, above, below
                x = convolve_padded(block.upsample_conv, padded)
                del padded
        padded = yield from self._normalize_padded(network.norm_out, x)
        del x
        return convolve_padded(network.conv_out, padded)

    # --- layers -----------------------------------------------------------------------------------------------------------------------

    def _conv_in(self, latent_1CHW: Tensor) -> Tensor:
        """Adds the zero padding after the first 1x1 convolution, whose bias must not affect it."""
        conv = self._network.post_quant_conv
        x_1CHW = latent_1CHW if conv is None else functional.conv2d(latent_1CHW, conv.weight, conv.bias)
        padded = functional.pad(x_1CHW, (0, 0, int(self._tile.is_first), int(self._tile.is_last)))
        return convolve_padded(self._network.conv_in, padded)

    def _resnet(self, block: Any, x_1CHW: Tensor) -> Swaps[Tensor]:
        padded = yield from self._normalize_padded(block.norm1, x_1CHW)
        hidden = convolve_padded(block.conv1, padded)
        del padded
        padded = yield from self._normalize_padded(block.norm2, hidden)
        del hidden
        hidden = convolve_padded(block.conv2, padded)
        del padded
        shortcut = block.conv_shortcut
        hidden += x_1CHW if shortcut is None else functional.conv2d(x_1CHW, shortcut.weight, shortcut.bias)
        return hidden if block.output_scale_factor == 1 else hidden.div_(float(block.output_scale_factor))

    def _normalize_padded(self, norm: nn.GroupNorm, x_1CHW: Tensor) -> Swaps[Tensor]:
        """Group norm over the whole picture and SiLU, padded by one row above and below: the neighbor's, or zeros."""
        return finish_norm_padded(post_norm(norm, x_1CHW, self._tile, with_edges=True), self._tile)

    def _attention(self, attention: Any, x_1CHW: Tensor) -> Swaps[Tensor]:
        """The strip's queries against the keys and values of all rows."""
        tile = self._tile
        normed_1CHW = yield from finish_norm(post_norm(attention.group_norm, x_1CHW, tile, with_edges=False), tile)
        x_1LD = normed_1CHW.flatten(2).transpose(1, 2)
        own = (attention.to_k(x_1LD), attention.to_v(x_1LD))
        awaited = tile.peers.post(dict.fromkeys(tile.others, own))
        q_1LD = attention.to_q(x_1LD)
        del normed_1CHW, x_1LD
        received = yield awaited
        key_1TD, value_1TD = gather_keys_and_values(own, received, tile, tuple(begin * x_1CHW.shape[3] for begin in tile.begins))
        del own, received
        mixed_1LD = _attend(attention, q_1LD, key_1TD, value_1TD)
        output_1CHW: Tensor = attention.to_out[0](mixed_1LD).transpose(1, 2).reshape(x_1CHW.shape)
        if attention.residual_connection:
            output_1CHW += x_1CHW
        return output_1CHW if attention.rescale_output_factor == 1 else output_1CHW.div_(float(attention.rescale_output_factor))


def _interleave(resnets: Sequence[Any], attentions: Sequence[Any | None]) -> list[tuple[Any, Any | None]]:
    """Each resnet with the attention after it; None for the last resnet."""
    return list(zip_longest(resnets, attentions))


def _attend(attention: Any, q_1LD: Tensor, k_1TD: Tensor, v_1TD: Tensor) -> Tensor:
    if isinstance(attention.processor, AttentionProcessorForge):
        return attention_function(q_1LD, k_1TD, v_1TD, attention.heads)
    q, k, v = (one.view(1, one.shape[1], attention.heads, -1).transpose(1, 2) for one in (q_1LD, k_1TD, v_1TD))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _double_padded(x_1CHW: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
    """Nearest-neighbor doubling into a tensor with one more row above and below. Only the nearer half of a doubled neighbor row is needed."""
    height, width = x_1CHW.shape[2:]
    padded = x_1CHW.new_empty(1, x_1CHW.shape[1], 2 * height + 2, 2 * width)
    _double_columns(x_1CHW, padded[:, :, 1:-1:2])
    padded[:, :, 2:-1:2].copy_(padded[:, :, 1:-1:2])
    for row, target in ((above, padded[:, :, :1]), (below, padded[:, :, -1:])):
        target.zero_() if row is None else _double_columns(row, target)
    return padded


def _double_columns(x_1CHW: Tensor, target: Tensor) -> None:
    target[..., 0::2].copy_(x_1CHW)
    target[..., 1::2].copy_(x_1CHW)
