"""Predicts the cost of a split VAE decode: rows per slot, multiplications, exchanges, crossing bytes, and whether splitting pays.

Pure arithmetic on sizes; knows no tensors, devices or threads. Sizes are in latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_SPEEDUP = 1.05
"""Below this predicted gain a picture is decoded whole. The planner uses the same limit for the UNet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSize:
    """What the cost depends on. The defaults fit SD 1.x and SDXL. `widths` go from the outermost level to the innermost."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    resnets_per_level: int = 3
    latent_channels: int = 4
    out_channels: int = 3
    num_groups: int = 32
    has_attention: bool = True

    @classmethod
    def from_config(cls, config: Any) -> DecoderSize:
        """From the config of a diffusers AutoencoderKL."""
        return cls(
            widths=tuple(config.block_out_channels),
            resnets_per_level=config.layers_per_block + 1,
            latent_channels=config.latent_channels,
            out_channels=config.out_channels,
            num_groups=config.norm_num_groups,
            has_attention=config.mid_block_add_attention,
        )

    @property
    def scale(self) -> int:
        """Picture rows for each latent row."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def num_exchanges(self) -> int:
        """How often a strip waits for others: once per group norm, once for keys and values, once per upsampling."""
        num_norms = 2 * (2 + self.resnets_per_level * len(self.widths)) + 1
        return num_norms + 2 * self.has_attention + len(self.widths) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCost:
    """`exchange_s`: time of an empty exchange (waking threads, starting small copies). `bytes_per_s`: how fast bytes arrive at each slot.

    The defaults are for two cards without peer access, which copy through host memory.
    """

    exchange_s: float = 3e-4
    bytes_per_s: float = 8e9


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitEstimate:
    """`rows` per slot (0: the slot is not used), seconds for a whole decode on the fastest slot and for the split one, and bytes that arrive
    at the slot that receives most."""

    rows: tuple[int, ...]
    whole_s: float
    split_s: float
    arriving_bytes: int

    @property
    def speedup(self) -> float:
        return self.whole_s / self.split_s


def divide_rows(num_rows: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Rows per slot such that the last row is done as early as possible: each row goes to the slot that would finish it first.

    A slot that is too slow for even one row gets none. Ties go to the earlier slot.

    Raises: ValueError for no slots, no rows, or speeds that are not above 0.
    """
    if num_rows < 1 or not speeds or not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        raise ValueError(f"{num_rows} rows cannot be divided by the speeds {tuple(speeds)}. Give at least one row, and finite speeds above 0.")
    rows = [0] * len(speeds)
    for _ in range(num_rows):
        rows[min(range(len(speeds)), key=lambda slot: (rows[slot] + 1) / speeds[slot])] += 1
    return tuple(rows)


def decode_macs(height: int, width: int, size: DecoderSize = DecoderSize()) -> int:
    """Multiplications of one whole decode, for convolutions and attention: 5.24e12 for SDXL at 128x128."""
    pixels, widest = height * width, size.widths[-1]
    macs = 9 * pixels * size.latent_channels * widest + 2 * _resnet_macs(pixels, widest, widest)
    if size.has_attention:
        macs += 4 * pixels * widest**2 + 2 * pixels**2 * widest
    before = widest
    for level, channels in enumerate(reversed(size.widths)):
        macs += _resnet_macs(pixels, before, channels) + (size.resnets_per_level - 1) * _resnet_macs(pixels, channels, channels)
        if level < len(size.widths) - 1:
            pixels *= 4
            macs += 9 * pixels * channels**2
        before = channels
    return macs + 9 * pixels * before * size.out_channels


def _resnet_macs(pixels: int, before: int, after: int) -> int:
    return 9 * pixels * (before * after + after * after) + (pixels * before * after if before != after else 0)


def arriving_bytes(rows: Sequence[int], width: int, bytes_per_number: int, size: DecoderSize = DecoderSize()) -> tuple[int, ...]:
    """Bytes that arrive at each slot from the others during one decode, not counting the latent and the picture."""
    taking_part = [slot for slot, count in enumerate(rows) if count]
    total, found = sum(rows), [0] * len(rows)
    for position, slot in enumerate(taking_part):
        peers = len(taking_part) - 1
        neighbors = min(position, 1) + min(peers - position, 1)
        found[slot] = neighbors * _halo_numbers(width, size) * bytes_per_number + peers * _statistics_bytes(size, bytes_per_number)
        if size.has_attention:
            found[slot] += 2 * (total - rows[slot]) * width * size.widths[-1] * bytes_per_number
    return tuple(found)


def _halo_numbers(width: int, size: DecoderSize) -> int:
    """How many numbers are in the rows that one neighbor sends."""
    widest = before = size.widths[-1]
    numbers = 4 * widest * width
    for level, channels in enumerate(reversed(size.widths)):
        numbers += (before + (2 * size.resnets_per_level - 1) * channels) * width
        if level < len(size.widths) - 1:
            numbers += channels * width
            width *= 2
        before = channels
    return numbers + before * width


def _statistics_bytes(size: DecoderSize, bytes_per_number: int) -> int:
    num_norms = size.num_exchanges - size.has_attention - (len(size.widths) - 1)
    return num_norms * 2 * size.num_groups * max(4, bytes_per_number)


def estimate_split(
    height: int,
    width: int,
    speeds: Sequence[float],
    *,
    whole_s: float,
    link: LinkCost = LinkCost(),
    bytes_per_number: int = 2,
    size: DecoderSize = DecoderSize(),
) -> SplitEstimate:
    """A split over slots of these relative speeds, where the fastest decodes the whole in `whole_s` (measured, or macs / the device's rate).

    Its time is the sum of the slowest strip's computation, the exchanges, and the transfer of the bytes that arrive at the busiest slot. No
    overlap is assumed, because every exchange is waited for.
    """
    rows = divide_rows(height, speeds)
    slowest_s = max(count / height * max(speeds) / speed for count, speed in zip(rows, speeds)) * whole_s
    busiest_bytes = max(arriving_bytes(rows, width, bytes_per_number, size))
    meeting_s = size.num_exchanges * link.exchange_s if sum(map(bool, rows)) > 1 else 0.0
    return SplitEstimate(rows=rows, whole_s=whole_s, split_s=slowest_s + meeting_s + busiest_bytes / link.bytes_per_s, arriving_bytes=busiest_bytes)


def worth_splitting(
    height: int,
    width: int,
    num_slots: int,
    *,
    speeds: Sequence[float] | None = None,
    whole_s: float | None = None,
    macs_per_s: float = 25e12,
    link: LinkCost = LinkCost(),
    bytes_per_number: int = 2,
    size: DecoderSize = DecoderSize(),
) -> bool:
    """Whether a split is predicted to be at least MIN_SPEEDUP times as fast as the fastest slot alone.

    More slots shorten the computation, but not the 34 exchanges of SDXL's decoder: at 0.3 ms each they cost 10 ms, a fifth of the decode of a
    512x512 picture on a fast card and more than the whole decode of a 128x128 one. With one slot or one latent row the answer is always no.
    `whole_s` is the measured time of one decode. Without it, the time is estimated from `macs_per_s` (default: a large card in half precision).
    """
    if num_slots < 2 or height < 2:
        return False
    if whole_s is None:
        whole_s = decode_macs(height, width, size) / macs_per_s
    estimate = estimate_split(height, width, speeds or (1.0,) * num_slots, whole_s=whole_s, link=link, bytes_per_number=bytes_per_number, size=size)
    return estimate.speedup >= MIN_SPEEDUP
