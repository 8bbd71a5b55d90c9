"""Layers of a picture cut into tiles of rows: group norms over all tiles, convolutions with the neighbors' rows, keys and values of all tiles.

Statistics are fp32 (fp64 for fp64 numbers) and are combined in the order of tiles, so that all tiles on devices of one kind get the same bits.
A norm and the convolution after it need one exchange: raw boundary rows travel with the sums, and each side normalizes the received row itself.
Never writes to modules: tiles on one device share them.

Shapes: B rows, C channels, H W rows and columns of this tile, G groups, N = B * G, R tiles, L tokens of this tile, T of all, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from backend.nn.tiles import Awaited, Received, Swaps, Tensors, Tile

_REDUCE_IN_ONE_KERNEL = ("cuda", "xpu", "mps")
_FEW_POSITIONS = 192
"""A CPU computes convolutions with at most so many results per channel faster as one matrix product: oneDNN reorders all weights at each call. 1280
channels, 8x16 positions: 47 ms instead of 66; 4x8: 16 instead of 44. With 288 positions and more it is slower."""
_HALF_PIECES = 4
"""For the statistics, half precision is converted to fp32 in this many pieces, which keeps the converted copy small."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How many rows beyond its own a tile reads at each end, 0 or 1."""

    above: int = 1
    below: int = 1


ReachOf = Callable[[int], Reach]
"""The reach of the tile with that rank."""


def reach_of_same(rank: int) -> Reach:
    """A 3x3 convolution that keeps the size."""
    return Reach()


def reach_of_halving(tile: Tile) -> ReachOf:
    """A 3x3 convolution of stride 2 and padding 1: row o reads rows 2o - 1 to 2o + 1, so it depends on whether a tile begins at an even row."""
    begins = tile.begins
    return lambda rank: Reach(above=1 - begins[rank] % 2, below=begins[rank + 1] % 2)


def reach_of_doubling(tile: Tile) -> ReachOf:
    """Nearest-neighbor doubling and a 3x3 convolution: row o reads rows (o - 1) // 2 to (o + 1) // 2."""
    begins = tile.cut.begins(tile.level - 1)
    return lambda rank: Reach(above=1, below=1 - begins[rank + 1] % 2)


# boundary rows


def edge_rows(x_BCHW: Tensor, tile: Tile, reach: ReachOf) -> dict[int, Tensors]:
    """For each neighbor, the rows of this tile that it reads. Views: they keep the tile's rows alive until they have arrived."""
    found: dict[int, Tensors] = {}
    for rank in tile.neighbors:
        count = reach(rank).below if rank < tile.rank else reach(rank).above
        rows = x_BCHW[:, :, :count] if rank < tile.rank else x_BCHW[:, :, x_BCHW.shape[2] - count :]
        found[rank] = (rows,) if count else ()
    return found


def received_edges(received: Received, tile: Tile, position: int = 0) -> tuple[Tensor | None, Tensor | None]:
    """The neighbors' rows above and below, at this position of their messages; None if they sent none."""
    above, below = (received.get(rank, ()) for rank in (tile.rank - 1, tile.rank + 1))
    return above[position] if len(above) > position else None, below[position] if len(below) > position else None


def pad_with_edges(x_BCHW: Tensor, above: Tensor | None, below: Tensor | None, tile: Tile, reach: Reach) -> Tensor:
    """The tile's rows between its neighbors'; zeros at the picture's edge."""
    batch, channels, height, width = x_BCHW.shape
    padded = x_BCHW.new_empty(batch, channels, height + reach.above + reach.below, width)
    padded[:, :, reach.above : reach.above + height].copy_(x_BCHW)
    if reach.above:
        _put(padded[:, :, :1], above)
    if reach.below:
        _put(padded[:, :, -1:], below)
    return padded


def _put(target: Tensor, row: Tensor | None) -> None:
    target.zero_() if row is None else target.copy_(row)


def fetch_edges(x_BCHW: Tensor, tile: Tile, reach: ReachOf) -> Swaps[tuple[Tensor | None, Tensor | None]]:
    """The neighbors' rows that this tile reads."""
    received = yield tile.peers.post(edge_rows(x_BCHW, tile, reach))
    return received_edges(received, tile)


# convolutions


def convolve_padded(conv: Any, padded_BCHW: Tensor) -> Tensor:
    """A 3x3 convolution of a tensor that already includes the rows above and below.

    A layer with hooks (its weights stream in, are dequantized, or get a side-branch LoRA) is called as a module: it pads once more, and the rows
    made from that padding are cut off.
    """
    if _is_bare(conv):
        if _is_small(conv, padded_BCHW):
            return _convolve_as_product(conv, padded_BCHW)
        return functional.conv2d(padded_BCHW, conv.weight, conv.bias, stride=conv.stride, padding=(0, 1))
    if conv.stride[0] == 1:
        whole: Tensor = conv(padded_BCHW)
        return whole[:, :, 1:-1]
    height = (padded_BCHW.shape[2] - 3) // conv.stride[0] + 1
    shifted: Tensor = conv(functional.pad(padded_BCHW, (0, 0, 1, 1)))
    return shifted[:, :, 1 : 1 + height]


def _is_small(conv: Any, padded_BCHW: Tensor) -> bool:
    batch, _, height, width = padded_BCHW.shape
    is_wide = padded_BCHW.dtype in (torch.float32, torch.float64)
    return is_wide and padded_BCHW.device.type == "cpu" and batch * (height - 2) * width <= _FEW_POSITIONS * conv.stride[0] ** 2


def _convolve_as_product(conv: Any, padded_BCHW: Tensor) -> Tensor:
    """The same sums as one product of the weights (C', 9 C) and what each position reads (9 C, B * positions)."""
    batch, _, height, width = padded_BCHW.shape
    read = functional.unfold(padded_BCHW, 3, padding=(0, 1), stride=conv.stride)
    columns = read[0] if batch == 1 else read.transpose(0, 1).flatten(1)
    weights = conv.weight.flatten(1)
    product: Tensor = weights @ columns if conv.bias is None else torch.addmm(conv.bias[:, None], weights, columns)
    sides = ((height - 3) // conv.stride[0] + 1, (width - 1) // conv.stride[1] + 1)
    return product.view(-1, batch, *sides).transpose(0, 1)


def _is_bare(layer: nn.Module) -> bool:
    """Whether calling the layer only computes its own function from its own weights."""
    changed = "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__
    return type(layer) is nn.Conv2d and not (changed or layer._forward_pre_hooks or layer._forward_hooks)


def halve(conv: nn.Module, x_BCHW: Tensor, tile: Tile) -> Swaps[Tensor]:
    """A 3x3 convolution of stride 2. The tile is at the next level afterwards."""
    reach = reach_of_halving(tile)
    above, below = yield from fetch_edges(x_BCHW, tile, reach)
    padded = pad_with_edges(x_BCHW, above, below, tile, reach(tile.rank))
    tile.level += 1
    return convolve_padded(conv, padded)


def double(conv: nn.Module, x_BCHW: Tensor, tile: Tile, width: int) -> Swaps[Tensor]:
    """Nearest-neighbor enlargement to the level before, `width` columns wide, and a 3x3 convolution. The tile is at that level afterwards.

    For any size s of that level, torch's nearest row for o of s rows out of ceil(s / 2) is o // 2, so tiles enlarge alone.
    """
    reach = reach_of_doubling(tile)
    above, below = yield from fetch_edges(x_BCHW, tile, reach)
    source = torch.cat([one for one in (above, x_BCHW, below) if one is not None], dim=2)
    first = tile.span[0] - (above is not None)
    tile.level -= 1
    start, end = tile.span
    large = functional.interpolate(source, size=(2 * source.shape[2], width), mode="nearest")
    large = large[:, :, max(0, start - 1) - 2 * first : min(tile.height, end + 1) - 2 * first]
    if tile.is_first or tile.is_last:
        large = functional.pad(large, (0, 0, int(tile.is_first), int(tile.is_last)))
    return convolve_padded(conv, large)


# group norms


@dataclass(frozen=True, slots=True)
class PostedNorm:
    """A group norm whose sums are on their way to the other tiles."""

    norm: nn.GroupNorm
    x_BCHW: Tensor
    own_2N: Tensor
    awaited: Awaited


def post_norm(norm: nn.GroupNorm, x_BCHW: Tensor, tile: Tile, *, with_edges: bool) -> PostedNorm:
    """Send the tile's sums, and with `with_edges` its boundary rows to the neighbors."""
    own_2N = moments(x_BCHW, norm.num_groups)
    edges = edge_rows(x_BCHW, tile, reach_of_same) if with_edges else {}
    return PostedNorm(norm, x_BCHW, own_2N, tile.peers.post({rank: (own_2N, *edges.get(rank, ())) for rank in tile.others}))


def finish_norm(posted: PostedNorm, tile: Tile) -> Swaps[Tensor]:
    """The tile's rows, normalized over all tiles."""
    received = yield posted.awaited
    scale, shift = _scale_and_shift(posted, received, tile)
    return affine(posted.x_BCHW, scale, shift, torch.empty_like(posted.x_BCHW))


def finish_norm_padded(posted: PostedNorm, tile: Tile) -> Swaps[Tensor]:
    """Normalized over all tiles, SiLU applied, with one row more above and below: the neighbor's, or zeros at the picture's edge."""
    received = yield posted.awaited
    scale, shift = _scale_and_shift(posted, received, tile)
    x_BCHW = posted.x_BCHW
    batch, channels, height, width = x_BCHW.shape
    padded = x_BCHW.new_empty(batch, channels, height + 2, width)
    affine(x_BCHW, scale, shift, padded[:, :, 1:-1])
    for row, target in zip(received_edges(received, tile, 1), (padded[:, :, :1], padded[:, :, -1:])):
        target.zero_() if row is None else affine(row, scale, shift, target)
    return functional.silu(padded, inplace=True)  # zeros stay zeros


def _scale_and_shift(posted: PostedNorm, received: Received, tile: Tile) -> tuple[Tensor, Tensor]:
    own_2N, number = posted.own_2N, posted.awaited.number
    moments_R2N = torch.stack([received[rank][0] if rank in received else own_2N for rank in range(tile.peers.count)])
    shares_R1 = tile.shares_on(own_2N.device, own_2N.dtype)
    mean_N, variance_N = join_moments(moments_R2N, shares_R1)
    if tile.norms is not None:
        tile.norms.now[number] = own_2N
        if (before_2N := tile.norms.before.get(number)) is not None:
            moments_R2N[tile.rank] = before_2N
            mean_N, variance_N = correct_moments(join_moments(moments_R2N, shares_R1), before_2N, own_2N)
    return scale_and_shift(posted.norm, mean_N, variance_N, posted.x_BCHW.shape[0])


def join_moments(moments_R2N: Tensor, shares_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (N,) of all tiles from those of each (Chan, Golub and LeVeque, 1979)."""
    mean_RN, variance_RN = moments_R2N.unbind(1)
    mean_N = (shares_R1 * mean_RN).sum(0)
    return mean_N, (shares_R1 * (variance_RN + (mean_RN - mean_N).square())).sum(0)


def correct_moments(before: tuple[Tensor, Tensor], own_before_2N: Tensor, own_2N: Tensor) -> tuple[Tensor, Tensor]:
    """All tiles' mean and variance of the pass before, moved by how this tile's E(x) and E(x^2) have changed since (Li et al. 2024, "DistriFusion",
    section 4.2). Where that gives no positive variance: the tile's own."""
    mean_N, variance_N = before
    own_mean_N, own_variance_N = own_2N.unbind(0)
    old_mean_N, old_variance_N = own_before_2N.unbind(0)
    moved_mean_N = mean_N + own_mean_N - old_mean_N
    moved_square_N = variance_N + mean_N.square() + own_variance_N + own_mean_N.square() - old_variance_N - old_mean_N.square()
    moved_variance_N = moved_square_N - moved_mean_N.square()
    return moved_mean_N, torch.where(moved_variance_N > 0, moved_variance_N, own_variance_N)


def scale_and_shift(norm: nn.GroupNorm, mean_N: Tensor, variance_N: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The norm with these statistics as scale and shift, (B, C, 1, 1)."""
    per_group = norm.num_channels // norm.num_groups
    inverse_BC = torch.rsqrt(variance_N + norm.eps).repeat_interleave(per_group).view(batch, -1)
    scale_BC = norm.weight.to(mean_N.dtype) * inverse_BC
    shift_BC = norm.bias.to(mean_N.dtype) - mean_N.repeat_interleave(per_group).view(batch, -1) * scale_BC
    return scale_BC[:, :, None, None], shift_BC[:, :, None, None]


def affine(x_BCHW: Tensor, scale: Tensor, shift: Tensor, target: Tensor) -> Tensor:
    """x * scale + shift in the statistics' dtype, rounded once into `target`."""
    return torch.addcmul(shift, x_BCHW, scale, out=target)


def moments(x_BCHW: Tensor, num_groups: int) -> Tensor:
    """Mean and (biased) variance of each group of each row, shape (2, N). The variance is computed from differences to the mean."""
    x_NKHW = x_BCHW.reshape(x_BCHW.shape[0] * num_groups, -1, *x_BCHW.shape[2:])
    return moments_in_kernel(x_NKHW) if x_BCHW.device.type in _REDUCE_IN_ONE_KERNEL else moments_by_group(x_NKHW)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments_in_kernel(x_NKHW: Tensor) -> Tensor:
    wide = _wide(x_NKHW.dtype)
    pieces = (x_NKHW,) if x_NKHW.dtype == wide else x_NKHW.chunk(_HALF_PIECES)
    found = [torch.var_mean(piece.to(wide), dim=(1, 2, 3), correction=0) for piece in pieces]
    return torch.stack([torch.cat([mean_N for _, mean_N in found]), torch.cat([variance_N for variance_N, _ in found])])


def moments_by_group(x_NKHW: Tensor) -> Tensor:
    """On the CPU, `var_mean` is ten times slower than a subtraction and a norm, which are vectorized and use the cache."""
    wide = _wide(x_NKHW.dtype)
    mean_N = x_NKHW.mean(dim=(1, 2, 3), dtype=wide)
    scratch_KHW = torch.empty(x_NKHW.shape[1:], dtype=wide, device=x_NKHW.device)
    deviations = [
        torch.linalg.vector_norm(torch.sub(x_KHW, mean_111, out=scratch_KHW))
        for x_KHW, mean_111 in zip(x_NKHW.unbind(), mean_N.view(-1, 1, 1, 1).unbind())
    ]
    return torch.stack([mean_N, torch.stack(deviations).square() / scratch_KHW.numel()])


# attention


def gather_keys_and_values(own: Tensors, received: Received, tile: Tile, begins: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values of all tiles in order, (B, T, D) each, in one buffer per shape. `begins`: the first token of each tile, and T."""
    batch, _, width = own[0].shape
    gathered = tile.buffer("keys and values", (2, batch, begins[-1], width), own[0])
    for rank in range(tile.peers.count):
        for part, whole in zip(received.get(rank, own), gathered):
            whole[:, begins[rank] : begins[rank + 1]].copy_(part)
    return gathered[0], gathered[1]
