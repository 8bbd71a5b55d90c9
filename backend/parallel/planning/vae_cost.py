"""What a split VAE decode costs before it is done: rows of each slot, multiplications, exchanges, bytes that cross, and whether it pays.

Pure arithmetic on sizes; knows no tensors, devices or threads. Sizes are latent rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_SPEEDUP = 1.05
"""Below this predicted gain a picture is decoded whole, as plans for the UNet are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSize:
    """What the cost depends on; the defaults are SD 1.x's and SDXL's. `widths` from the outermost level to the innermost."""

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
        """Times that a strip waits for others: one for each group norm, one for keys and values, one for each doubling."""
        num_norms = 2 * (2 + self.resnets_per_level * len(self.widths)) + 1
        return num_norms + 2 * self.has_attention + len(self.widths) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCost:
    """`exchange_s`: what one exchange takes with nothing in it (threads woken, small copies begun); `bytes_per_s`: each slot's way in.

    The defaults are those of two cards without peer access, through host memory.
    """

    exchange_s: float = 3e-4
    bytes_per_s: float = 8e9


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitEstimate:
    """`rows` of each slot (0: it takes no part), seconds whole on the fastest slot and split, bytes that arrive at the busiest slot."""

    rows: tuple[int, ...]
    whole_s: float
    split_s: float
    arriving_bytes: int

    @property
    def speedup(self) -> float:
        return self.whole_s / self.split_s


def divide_rows(num_rows: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Rows of each slot such that the last one is done as early as possible: every row goes to the slot that would end it first.

    A slot too slow for a single row gets none. Ties go to the earlier slot.

    Raises: ValueError for no slots, no rows, or speeds that are not above 0.
    """
    if num_rows < 1 or not speeds or not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        raise ValueError(f"{num_rows} rows were to be divided over speeds {tuple(speeds)}; give at least one row and speeds above 0.")
    rows = [0] * len(speeds)
    for _ in range(num_rows):
        rows[min(range(len(speeds)), key=lambda slot: (rows[slot] + 1) / speeds[slot])] += 1
    return tuple(rows)


def decode_macs(height: int, width: int, size: DecoderSize = DecoderSize()) -> int:
    """Multiplications of one whole decode: convolutions and attention; 5.24e12 for SDXL at 128x128."""
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
    """Bytes that come to each slot from the others during one decode; the latent and the picture are not in it."""
    taking_part = [slot for slot, count in enumerate(rows) if count]
    total, found = sum(rows), [0] * len(rows)
    for position, slot in enumerate(taking_part):
        peers = len(taking_part) - 1
        neighbours = min(position, 1) + min(peers - position, 1)
        found[slot] = neighbours * _halo_numbers(width, size) * bytes_per_number + peers * _statistics_bytes(size, bytes_per_number)
        if size.has_attention:
            found[slot] += 2 * (total - rows[slot]) * width * size.widths[-1] * bytes_per_number
    return tuple(found)


def _halo_numbers(width: int, size: DecoderSize) -> int:
    """Numbers in the rows that one neighbour sends."""
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
    """Split over slots of these relative speeds, where the fastest decodes the whole in `whole_s` (measured, or macs by the device's rate).

    A split takes as long as its slowest strip computes, its exchanges take to meet, and the bytes take to come to the busiest slot; no
    overlap is counted, as each exchange is waited for.
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
    """Whether a split is predicted to gain at least MIN_SPEEDUP over the fastest slot alone.

    Computing shrinks with the slots, the 34 exchanges of SDXL's decoder do not: at 0.3 ms each they cost 10 ms, a fifth of a 512x512
    picture's decode on a fast card and more than all of a 128x128 picture's. One slot, or one latent row, is never worth it. `whole_s` is what
    one decode took, where that was measured; else `macs_per_s` stands for it (the default is a large card's in half precision).
    """
    if num_slots < 2 or height < 2:
        return False
    if whole_s is None:
        whole_s = decode_macs(height, width, size) / macs_per_s
    estimate = estimate_split(height, width, speeds or (1.0,) * num_slots, whole_s=whole_s, link=link, bytes_per_number=bytes_per_number, size=size)
    return estimate.speedup >= MIN_SPEEDUP
