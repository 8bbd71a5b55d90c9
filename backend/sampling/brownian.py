"""A Brownian path over an interval of noise levels, built by halving, so that two samplers that use the same levels get the same noise.

The path equals torchsde.BrownianTree's for the same entropy, bit for bit. It is built here because the normal numbers may have to come from Philox
instead of torch, and because several threads sample at once. Must not know samplers or images.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from torch import Tensor

RandnFromSeed = Callable[[int], Tensor]
"""Normal numbers of the path's shape from a seed; equal seeds give equal numbers."""

_DIGITS = 6
_POOL_SIZE = 24
_CACHED_NODES = 45


class BrownianPath:
    """Increments W(stop) - W(start) for levels in [low, high]. Not thread-safe."""

    def __init__(self, low: float, high: float, entropy: int, randn: RandnFromSeed) -> None:
        if not low < high:
            raise ValueError(f"A Brownian path from {low} to {high} was requested; its start must be below its end.")
        self.low, self.high = round(float(low), _DIGITS), round(float(high), _DIGITS)
        self._entropy, self._randn = entropy, randn
        seed = int(np.random.SeedSequence(entropy=entropy, pool_size=_POOL_SIZE).generate_state(3)[0])
        self._whole = randn(seed) * math.sqrt(float(high) - float(low))
        self._cache: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def increment(self, start: float, stop: float) -> Tensor:
        """The path's change from `start` to `stop`, with start below stop. Levels outside the interval are clamped to it."""
        start, stop = (round(min(max(float(level), self.low), self.high), _DIGITS) for level in (start, stop))
        if start >= stop:
            return self._whole * 0
        parts = list(self._cover(start, stop, self.low, self.high, (0, 0), self._whole))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _cover(self, start: float, stop: float, low: float, high: float, node: tuple[int, int], change: Tensor) -> list[Tensor]:
        """The changes over the dyadic pieces of [low, high] that cover [start, stop]. `node` is (depth, position)."""
        if start <= low and stop >= high:
            return [change]
        middle = round(0.5 * (high + low), _DIGITS)
        depth, position = node
        left = self._left_half(node, low, middle, high, change)
        pieces: list[Tensor] = []
        if start < middle:
            pieces += self._cover(start, min(stop, middle), low, middle, (depth + 1, 2 * position), left)
        if stop > middle:
            pieces += self._cover(max(start, middle), stop, middle, high, (depth + 1, 2 * position + 1), change - left)
        return pieces

    def _left_half(self, node: tuple[int, int], low: float, middle: float, high: float, change: Tensor) -> Tensor:
        """The change over the left half, from a Brownian bridge at the middle (Levy's construction)."""
        if node in self._cache:
            self._cache.move_to_end(node)
            return self._cache[node]
        depth, position = node
        sequence = np.random.SeedSequence(entropy=self._entropy, spawn_key=(position, depth), pool_size=_POOL_SIZE)
        reciprocal = 1 / (high - low)
        mean = (middle - low) * change * reciprocal
        spread = math.sqrt((middle - low) * (high - middle) * reciprocal)
        left = mean + spread * self._randn(int(sequence.generate_state(4)[0]))
        self._cache[node] = left
        if len(self._cache) > _CACHED_NODES:
            self._cache.popitem(last=False)
        return left
