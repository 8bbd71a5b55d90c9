"""One strip's forward: runs a strip of rows through the decoder, fetching what it needs from other strips.

Every 3x3 convolution needs one row from each neighbor, every group norm the statistics of the whole picture. Nearly every convolution here
follows a norm, so one exchange carries both: raw boundary rows, and the strip's mean and variance. Each side then normalizes the received row
itself. Statistics are fp32 (fp64 for fp64 weights) and are combined in strip order, so all strips (on devices of one kind) get the same
bits. Never writes to modules: strips on one device share them.

Shapes: 1 one picture, C channels, H rows of this strip, W columns, G groups, R strips, L tokens of this strip, T tokens of the picture, D = C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.attention import AttentionProcessorForge, attention_function
from backend.parallel.vae.exchange import StripLinks
from backend.parallel.vae.layers import StripNetwork

_REDUCE_IN_ONE_KERNEL = ("cuda", "xpu", "mps")
_HALF_PIECES = 4
"""For the statistics, half precision is converted to fp32 in this many pieces, which keeps the converted copy small."""


@dataclass(frozen=True, slots=True)
class Halo:
    """The neighbors' nearest rows, 1C1W; None at the picture's edge, where convolutions see zeros."""

    above: Tensor | None
    below: Tensor | None


class DecoderStrip:
    """Decodes one strip. `row_shares` is each strip's share of the picture's rows; they sum to 1."""

    def __init__(self, network: StripNetwork, row_shares: Sequence[float], links: StripLinks) -> None:
        self._network, self._links = network, links
        self._above = links.rank - 1 if links.rank > 0 else None
        self._below = links.rank + 1 if links.rank + 1 < len(row_shares) else None
        self._neighbors = tuple(peer for peer in (self._above, self._below) if peer is not None)
        self._shares_R1 = torch.tensor(list(row_shares), dtype=_wide(network.dtype)).unsqueeze(1).to(links.devices[links.rank])

    def decode(self, latent_1CHW: Tensor) -> Tensor:
        """The strip's picture rows, from its latent rows plus one row from each neighbor."""
        network = self._network
        x = self._conv_in(latent_1CHW)
        for resnet, attention in _interleave(network.mid_resnets, network.mid_attentions):
            x = self._resnet(resnet, x)
            if attention is not None:
                x = self._attention(attention, x)
        for block in network.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            if block.upsample_conv is not None:
                padded = _double_padded(x, self._fetch_halo(x))
                del x
                x = _convolve_padded(block.upsample_conv, padded)
                del padded
        padded = self._normalize_padded(network.norm_out, x)
        del x
        return _convolve_padded(network.conv_out, padded)

    # --- layers -----------------------------------------------------------------------------------------------------------------------

    def _conv_in(self, latent_1CHW: Tensor) -> Tensor:
        """Adds the zero padding after the first 1x1 convolution, whose bias must not affect it."""
        conv = self._network.post_quant_conv
        x_1CHW = latent_1CHW if conv is None else functional.conv2d(latent_1CHW, conv.weight, conv.bias)
        padded = functional.pad(x_1CHW, (0, 0, int(self._above is None), int(self._below is None)))
        return _convolve_padded(self._network.conv_in, padded)

    def _resnet(self, block: Any, x_1CHW: Tensor) -> Tensor:
        padded = self._normalize_padded(block.norm1, x_1CHW)
        hidden = _convolve_padded(block.conv1, padded)
        del padded
        padded = self._normalize_padded(block.norm2, hidden)
        del hidden
        hidden = _convolve_padded(block.conv2, padded)
        del padded
        shortcut = block.conv_shortcut
        hidden += x_1CHW if shortcut is None else functional.conv2d(x_1CHW, shortcut.weight, shortcut.bias)
        return hidden if block.output_scale_factor == 1 else hidden.div_(float(block.output_scale_factor))

    def _attention(self, attention: Any, x_1CHW: Tensor) -> Tensor:
        """The strip's queries against the keys and values of all rows."""
        scale, shift = self._fetch_affine(attention.group_norm, x_1CHW)[0]
        x_1LD = _affine(x_1CHW, scale, shift, torch.empty_like(x_1CHW)).flatten(2).transpose(1, 2)
        q_1LD = attention.to_q(x_1LD)
        own_2LD = torch.cat([attention.to_k(x_1LD), attention.to_v(x_1LD)])
        del x_1LD
        received = self._links.swap(dict.fromkeys(self._links.peers, (own_2LD,)))
        parts = [received[rank][0] if rank in received else own_2LD for rank in range(len(self._shares_R1))]
        del received
        mixed_1LD = _attend(attention, q_1LD, torch.cat([part[:1] for part in parts], dim=1), torch.cat([part[1:] for part in parts], dim=1))
        output_1CHW: Tensor = attention.to_out[0](mixed_1LD).transpose(1, 2).reshape(x_1CHW.shape)
        if attention.residual_connection:
            output_1CHW += x_1CHW
        return output_1CHW if attention.rescale_output_factor == 1 else output_1CHW.div_(float(attention.rescale_output_factor))

    # --- what crosses -----------------------------------------------------------------------------------------------------------------

    def _normalize_padded(self, norm: nn.GroupNorm, x_1CHW: Tensor) -> Tensor:
        """Group norm over the whole picture and SiLU, padded by one row above and below: the neighbor's, or zeros."""
        (scale, shift), halo = self._fetch_affine(norm, x_1CHW, with_halo=True)
        padded = _empty_padded(x_1CHW, x_1CHW.shape[2], x_1CHW.shape[3])
        _affine(x_1CHW, scale, shift, padded[:, :, 1:-1])
        for row, target in ((halo.above, padded[:, :, :1]), (halo.below, padded[:, :, -1:])):
            target.zero_() if row is None else _affine(row, scale, shift, target)
        return functional.silu(padded, inplace=True)  # zeros stay zeros

    def _fetch_affine(self, norm: nn.GroupNorm, x_1CHW: Tensor, *, with_halo: bool = False) -> tuple[tuple[Tensor, Tensor], Halo]:
        """(scale, shift) per channel that normalize over the whole picture, and the neighbors' raw rows from the same exchange."""
        own_2G = _moments(x_1CHW, norm.num_groups)
        outgoing = {peer: (own_2G, *(self._row_for(peer, x_1CHW) if with_halo else ())) for peer in self._links.peers}
        received = self._links.swap(outgoing)
        moments = [received[rank][0] if rank in received else own_2G for rank in range(len(self._shares_R1))]
        above, below = (received[peer][1] if with_halo and peer is not None else None for peer in (self._above, self._below))
        return self._join_moments(norm, torch.stack(moments)), Halo(above, below)

    def _fetch_halo(self, x_1CHW: Tensor) -> Halo:
        received = self._links.swap({peer: self._row_for(peer, x_1CHW) for peer in self._neighbors})
        above, below = (None if peer is None else received[peer][0] for peer in (self._above, self._below))
        return Halo(above, below)

    def _row_for(self, peer: int, x_1CHW: Tensor) -> tuple[Tensor, ...]:
        """The row next to a neighbor, as a copy because a view would keep the whole strip alive. Empty for other peers."""
        if peer == self._above:
            return (x_1CHW[:, :, :1].clone(),)
        return (x_1CHW[:, :, -1:].clone(),) if peer == self._below else ()

    def _join_moments(self, norm: nn.GroupNorm, moments_R2G: Tensor) -> tuple[Tensor, Tensor]:
        """Combine the strips' means and variances (Chan, Golub and LeVeque, 1979) into the scale and shift of each channel."""
        mean_RG, variance_RG = moments_R2G.unbind(1)
        mean_G = (self._shares_R1 * mean_RG).sum(0)
        variance_G = (self._shares_R1 * (variance_RG + (mean_RG - mean_G).square())).sum(0)
        channels_per_group = norm.num_channels // norm.num_groups
        scale_C = norm.weight.to(mean_G.dtype) * torch.rsqrt(variance_G + norm.eps).repeat_interleave(channels_per_group)
        shift_C = norm.bias.to(mean_G.dtype) - mean_G.repeat_interleave(channels_per_group) * scale_C
        return scale_C.view(1, -1, 1, 1), shift_C.view(1, -1, 1, 1)


def _interleave(resnets: Sequence[Any], attentions: Sequence[Any | None]) -> list[tuple[Any, Any | None]]:
    """Each resnet with the attention after it; None for the last resnet."""
    return list(zip_longest(resnets, attentions))


def _attend(attention: Any, q_1LD: Tensor, k_1TD: Tensor, v_1TD: Tensor) -> Tensor:
    if isinstance(attention.processor, AttentionProcessorForge):
        return attention_function(q_1LD, k_1TD, v_1TD, attention.heads)
    q, k, v = (one.view(1, one.shape[1], attention.heads, -1).transpose(1, 2) for one in (q_1LD, k_1TD, v_1TD))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _affine(x_1CHW: Tensor, scale: Tensor, shift: Tensor, target: Tensor) -> Tensor:
    """x * scale + shift in fp32, rounded once into `target`."""
    return torch.addcmul(shift, x_1CHW, scale, out=target)


def _convolve_padded(conv: nn.Conv2d, padded_1CHW: Tensor) -> Tensor:
    """A 3x3 convolution of a tensor that already includes the rows above and below."""
    return functional.conv2d(padded_1CHW, conv.weight, conv.bias, padding=(0, 1))


def _empty_padded(like: Tensor, height: int, width: int) -> Tensor:
    return like.new_empty(1, like.shape[1], height + 2, width)


def _double_padded(x_1CHW: Tensor, halo: Halo) -> Tensor:
    """Nearest-neighbor doubling into a tensor with one more row above and below. Only the nearer half of a doubled neighbor row is needed."""
    height, width = x_1CHW.shape[2:]
    padded = _empty_padded(x_1CHW, 2 * height, 2 * width)
    _double_columns(x_1CHW, padded[:, :, 1:-1:2])
    padded[:, :, 2:-1:2].copy_(padded[:, :, 1:-1:2])
    for row, target in ((halo.above, padded[:, :, :1]), (halo.below, padded[:, :, -1:])):
        target.zero_() if row is None else _double_columns(row, target)
    return padded


def _double_columns(x_1CHW: Tensor, target: Tensor) -> None:
    target[..., 0::2].copy_(x_1CHW)
    target[..., 1::2].copy_(x_1CHW)


# --- statistics ---------------------------------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _moments(x_1CHW: Tensor, num_groups: int) -> Tensor:
    """Mean and (biased) variance of each group, shape 2G. The variance is computed from differences to the mean."""
    x_GKHW = x_1CHW.view(num_groups, -1, *x_1CHW.shape[2:])
    return _moments_in_kernel(x_GKHW) if x_1CHW.device.type in _REDUCE_IN_ONE_KERNEL else _moments_by_group(x_GKHW)


def _moments_in_kernel(x_GKHW: Tensor) -> Tensor:
    wide = _wide(x_GKHW.dtype)
    pieces = (x_GKHW,) if x_GKHW.dtype == wide else x_GKHW.chunk(_HALF_PIECES)
    moments = [torch.var_mean(piece.to(wide), dim=(1, 2, 3), correction=0) for piece in pieces]
    return torch.stack([torch.cat([mean_G for _, mean_G in moments]), torch.cat([variance_G for variance_G, _ in moments])])


def _moments_by_group(x_GKHW: Tensor) -> Tensor:
    """On the CPU, `var_mean` is ten times slower than a subtraction and a norm, which are vectorized and use the cache."""
    wide = _wide(x_GKHW.dtype)
    mean_G = x_GKHW.mean(dim=(1, 2, 3), dtype=wide)
    scratch_KHW = torch.empty(x_GKHW.shape[1:], dtype=wide, device=x_GKHW.device)
    deviations = [
        torch.linalg.vector_norm(torch.sub(x_KHW, mean_111, out=scratch_KHW))
        for x_KHW, mean_111 in zip(x_GKHW.unbind(), mean_G.view(-1, 1, 1, 1).unbind())
    ]
    return torch.stack([mean_G, torch.stack(deviations).square() / scratch_KHW.numel()])
