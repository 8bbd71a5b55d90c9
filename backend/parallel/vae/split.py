"""Decodes one latent on several slots at once, exactly: every slot computes a strip of the picture's rows.

`SplitDecoder` divides the rows, gives each slot its strip and joins the picture. `strip` does a strip's work, `layers` finds what cannot be
split, and `planning.vae_cost.worth_splitting` decides whether splitting pays.

Shapes: BCHW latents and pictures; 1CHW a single one.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from backend.devices.slot import canonical_device
from backend.parallel.planning.vae_cost import divide_rows
from backend.parallel.vae.exchange import Board, Message, ReleasedError, SplitStalledError, StripLinks, pack, unpack
from backend.parallel.vae.layers import CannotSplit, StripNetwork, read_strip_network
from backend.parallel.vae.strip import DecoderStrip

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["CannotSplit", "DecoderShard", "SplitDecoder", "SplitStalledError"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STALL_S = 600.0
_submitting = threading.Lock()
"""Locked while one decode's strips are submitted, so that all workers get the strips of two decodes in the same order. Strips of a decode wait for
each other, so two decodes in opposite orders on two workers would deadlock."""


class Submit(Protocol):
    """Gives a function to a slot's worker thread, first come, first served."""

    def __call__(self, function: Callable[[], T], /) -> Future[T]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShard:
    """One slot's part. `network` is an AutoencoderKL with all its weights on `device`; slots on the same device may share it.

    `run` must use a different thread for each shard. `speed` is relative; rows are dealt in proportion to it.
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

    `output_device` is where pictures go. Every strip calls `before_exchange` before each of its exchanges, in its worker's thread; an exception
    there ends the decode (for cancelling). `stall_s` is how long a strip waits for another one.

    Raises: CannotSplit for fewer than two shards, networks that differ, or a network with parts that strips do not know.
    """

    def __init__(
        self,
        shards: Sequence[DecoderShard],
        *,
        output_device: torch.device | None = None,
        before_exchange: Callable[[], None] | None = None,
        stall_s: float = _STALL_S,
    ) -> None:
        if len(shards) < 2:
            raise CannotSplit(f"A VAE decode cannot be split over {len(shards)} slots; it takes at least two. Decode whole.")
        self._shards = tuple(shards)
        self._networks = tuple(read_strip_network(shard.network, shard.device) for shard in shards)
        self._output_device = canonical_device(output_device or torch.device("cpu"))
        self._before_exchange, self._stall_s = before_exchange, stall_s
        _check_alike(self._shards)

    @property
    def scale(self) -> int:
        """Picture rows for each latent row."""
        return self._networks[0].scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode (B, C, H, W) latents, scaled as the network takes them, to (B, 3, 8H, 8W) in the network's dtype on the output device.

        Image by image, each split over all slots. Raises: what a worker raised, or SplitStalledError. By then nothing runs any more and the
        strips' memory is free, so the caller may try again or decode whole.
        """
        pictures = [self._decode_one(latents_BCHW[index : index + 1]) for index in range(latents_BCHW.shape[0])]
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)

    def _decode_one(self, latent_1CHW: Tensor) -> Tensor:
        strips = self._divide(latent_1CHW.shape[2])
        board = Board(stall_s=self._stall_s)
        tasks = [partial(self._run_strip, strips, rank, _cut(latent_1CHW, strip), board) for rank, strip in enumerate(strips)]
        messages = _run_together([strip.shard for strip in strips], tasks, board)
        return torch.cat([unpack(message)[0] for message in messages], dim=2)

    def _divide(self, num_rows: int) -> tuple[_Strip, ...]:
        """Strips from top to bottom, in the order of the shards. A shard without rows gets none."""
        rows = divide_rows(num_rows, [shard.speed for shard in self._shards])
        return tuple(
            _Strip(shard=shard, network=network, start=end - count, end=end)
            for shard, network, count, end in zip(self._shards, self._networks, rows, accumulate(rows))
            if count
        )

    def _run_strip(self, strips: Sequence[_Strip], rank: int, latent: Message, board: Board) -> Message:
        """Decode one strip, in the worker's thread."""
        strip, num_rows = strips[rank], strips[-1].end
        devices = tuple(canonical_device(one.shard.device) for one in strips)
        links = StripLinks(board=board, rank=rank, devices=devices, before_exchange=self._before_exchange)
        try:
            with torch.no_grad():
                board.raise_if_aborted(rank)
                shares = [(one.end - one.start) / num_rows for one in strips]
                (rows_1CHW,) = unpack(latent)
                rows_1CHW = rows_1CHW.to(device=devices[rank], dtype=strip.network.dtype)
                picture_1CHW = DecoderStrip(strip.network, shares, links).decode(rows_1CHW)
                return pack((picture_1CHW,), self._output_device)
        except ReleasedError:
            raise
        except BaseException as error:
            board.abort()
            logger.info(
                "VAE decode of rows %d to %d of %d on %s stopped at exchange %d: %s",
                strip.start, strip.end, num_rows, strip.shard.device, links.num_exchanges, error,
            )  # fmt: skip
            raise


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


def _cut(latent_1CHW: Tensor, strip: _Strip) -> Message:
    """The strip's rows plus one on each side if there is one, still on the latent's device: the strip's worker fetches them."""
    rows_1CHW = latent_1CHW[:, :, max(0, strip.start - 1) : strip.end + 1]
    return pack((rows_1CHW,), rows_1CHW.device)


def _run_together(shards: Sequence[DecoderShard], tasks: Sequence[Callable[[], Message]], board: Board) -> list[Message]:
    """Run all tasks at once, each on its shard's worker, and return their results in order. Returns only when no task runs any more."""
    futures: list[Future[Message]] = []
    cause: BaseException | None = None
    try:
        _submit_all(shards, tasks, board, futures)
        wait(futures)
        cause = _find_cause(futures)
        if cause is not None:
            raise cause
        return [future.result() for future in futures]
    finally:
        board.abort()
        wait(futures)
        futures.clear()  # otherwise the error's traceback and this frame keep each other alive
        cause = None


def _submit_all(shards: Sequence[DecoderShard], tasks: Sequence[Callable[[], Message]], board: Board, futures: list[Future[Message]]) -> None:
    with _submitting:
        for shard, task in zip(shards, tasks):
            future = shard.run(task)
            futures.append(future)
            future.add_done_callback(partial(_abort_unless_done, board))


def _abort_unless_done(board: Board, future: Future[Message]) -> None:
    """For strips that never started: cancelled in the queue, or their worker is lost."""
    if future.cancelled() or future.exception() is not None:
        board.abort()


def _find_cause(futures: Sequence[Future[Message]]) -> BaseException | None:
    """The first error that is not a consequence of another. Clears the frames of all failed strips, which frees their tensors.

    Device errors come last: both ends of a failed copy have one, and a worker that found its slot lost says more.
    """
    errors = [found for future in futures if not future.cancelled() and (found := future.exception()) is not None]
    for found in errors:
        traceback.clear_frames(found.__traceback__)
    causes: list[BaseException] = [found for found in errors if not isinstance(found, ReleasedError)]
    if any(future.cancelled() for future in futures):
        causes.append(CancelledError("A strip of a split VAE decode was cancelled before it started."))
    causes.sort(key=lambda found: isinstance(found, torch.AcceleratorError))
    return next(iter([*causes, *errors]), None)
