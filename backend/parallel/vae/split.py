"""Decodes one latent on several slots at once, exactly: every slot computes a strip of the picture's rows.

`SplitDecoder` divides the rows, gives each slot its strip and joins the picture. `strip` does a strip's work, `layers` finds what cannot be
split, and `planning.vae_cost.worth_splitting` decides whether splitting pays.

Shapes: BCHW latents and pictures; 1CHW a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backend.devices.slot import canonical_device
from backend.parallel.exchange.meeting import Meeting, TilePeers
from backend.parallel.exchange.tile_task import Submit, TileTask, TileWork, finish_all
from backend.parallel.exchange.transport import Transfer, Transport, make_transport
from backend.parallel.planning.vae_cost import divide_rows
from backend.parallel.vae.layers import CannotSplit, StripNetwork, read_strip_network
from backend.parallel.vae.strip import DecoderStrip

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["CannotSplit", "DecoderShard", "SplitDecoder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShard:
    """One slot's part. `network` is an AutoencoderKL with all its weights on `device`; slots on the same device may share it.

    `run` gives the strip's work to its thread, piece by piece. `speed` is relative; rows are dealt in proportion to it.
    """

    network: AutoencoderKL
    device: torch.device
    run: Submit
    speed: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Strip:
    """Rows `start` to `end` of the latent on one shard."""

    shard: DecoderShard
    network: StripNetwork
    start: int
    end: int


class SplitDecoder:
    """Decodes on all shards at once. Pictures equal `vae.decode` up to rounding. May be called from several threads.

    `output_device` is where pictures go, `transport` how tensors move between the slots. Every strip calls `before_exchange` before each of its
    exchanges, in its worker's thread; an exception there ends the decode (for cancelling).

    Raises: CannotSplit for fewer than two shards, networks that differ, or a network with parts that strips do not know.
    """

    def __init__(
        self,
        shards: Sequence[DecoderShard],
        *,
        output_device: torch.device | None = None,
        before_exchange: Callable[[], None] | None = None,
        transport: Transport | None = None,
    ) -> None:
        if len(shards) < 2:
            raise CannotSplit(f"A VAE decode cannot be split over {len(shards)} slots; it takes at least two. Decode whole.")
        self._shards = tuple(shards)
        self._networks = tuple(read_strip_network(shard.network, shard.device) for shard in shards)
        self._output_device = canonical_device(output_device or torch.device("cpu"))
        self._before_exchange, self._transport = before_exchange, transport or make_transport()
        _check_alike(self._shards)

    @property
    def scale(self) -> int:
        """Picture rows for each latent row."""
        return self._networks[0].scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode (B, C, H, W) latents, scaled as the network takes them, to (B, 3, 8H, 8W) in the network's dtype on the output device.

        Image by image, each split over all slots. Raises: what a worker raised. By then nothing runs any more and the strips' memory is free, so
        the caller may try again or decode whole.
        """
        pictures = [self._decode_one(latents_BCHW[index : index + 1]) for index in range(latents_BCHW.shape[0])]
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _decode_one(self, latent_1CHW: Tensor) -> Tensor:
        strips = self._divide(latent_1CHW.shape[2])
        devices = [canonical_device(strip.shard.device) for strip in strips]
        meeting = Meeting(devices, lambda tensor, rank: self._transport.ship(tensor, devices[rank]))
        tasks = [
            TileTask(self._run_strip(strips, rank, _cut(latent_1CHW, strip), meeting), strip.shard.run, meeting, rank)
            for rank, strip in enumerate(strips)
        ]
        return torch.cat([transfer.receive() for transfer in finish_all(tasks)], dim=2)

    def _divide(self, num_rows: int) -> tuple[_Strip, ...]:
        """Strips from top to bottom, in the order of the shards. A shard without rows gets none."""
        rows = divide_rows(num_rows, [shard.speed for shard in self._shards])
        return tuple(
            _Strip(shard=shard, network=network, start=end - count, end=end)
            for shard, network, count, end in zip(self._shards, self._networks, rows, accumulate(rows))
            if count
        )

    def _run_strip(self, strips: Sequence[_Strip], rank: int, latent_1CHW: Tensor, meeting: Meeting) -> TileWork[Transfer]:
        """Decode one strip, in the worker's thread, and send its picture rows off."""
        network, peers = strips[rank].network, TilePeers(meeting, rank, self._before_exchange)
        strip = DecoderStrip(network, [one.end - one.start for one in strips], peers)
        rows_1CHW = self._transport.send(latent_1CHW, meeting.devices[rank]).to(network.dtype)
        picture_1CHW = yield from strip.decode(rows_1CHW)
        return self._transport.ship(picture_1CHW, self._output_device)


def _check_alike(shards: Sequence[DecoderShard]) -> None:
    shapes = [_describe_weights(shard.network) for shard in shards]
    for shard, found in zip(shards, shapes):
        if found != shapes[0]:
            raise CannotSplit(
                f"The VAE on {shard.device} differs in layers or dtype from the one on {shards[0].device}. Give all slots the same VAE."
            )


def _describe_weights(network: Any) -> dict[str, tuple[torch.Size, torch.dtype]]:
    parts = (("decoder", network.decoder), ("post_quant_conv", network.post_quant_conv))
    return {
        f"{part}.{name}": (parameter.shape, parameter.dtype)
        for part, module in parts
        if module is not None
        for name, parameter in module.named_parameters()
    }


def _cut(latent_1CHW: Tensor, strip: _Strip) -> Tensor:
    """The strip's rows plus one on each side if there is one, still on the latent's device: the strip's worker fetches them."""
    return latent_1CHW[:, :, max(0, strip.start - 1) : strip.end + 1]
