"""A CUDA GPU's normal numbers, computed on the host: Philox 4x32-10 and Box-Muller. Must not know torch, pictures or what seeds mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_WORD, _WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)
_UNIT = float(np.float32(2.0**-32))
_TURN = float(np.float32(2.0**-32) * np.float32(2 * np.pi))


def philox_4x32(counter: Words, key: Words, num_rounds: int = 10) -> Words:
    """Four random words (4, n) for each counter (4, n) under each key (2, n).

    Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3.
    """
    words = counter.astype(np.uint64)
    keys = key.astype(np.uint64)
    for _ in range(num_rounds):
        first, second = words[0] * np.uint64(_ROUND_MULTIPLIERS[0]), words[2] * np.uint64(_ROUND_MULTIPLIERS[1])
        words = np.stack(
            [
                (second >> _WORD_BITS) ^ words[1] ^ keys[0],
                second & _LOW_WORD,
                (first >> _WORD_BITS) ^ words[3] ^ keys[1],
                first & _LOW_WORD,
            ]
        )
        keys = (keys + np.array(_KEY_INCREMENTS, dtype=np.uint64)[:, None]) & _LOW_WORD
    return words.astype(np.uint32)


class PhiloxGenerator:
    """A stream of normal numbers equal to torch.randn's on a CUDA GPU with that seed, call by call.

    Each number has its own thread, as on a GPU with at least as many threads as numbers (current cards have more than 80,000). A GPU would fill a
    tensor with more numbers than it has threads in a different order.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed % 2**64
        self.offset = 0

    def randn(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """Normal numbers, fp32. Box-Muller as in CUDA's curand_normal, using the sine of each pair."""
        num_values = int(np.prod(shape, dtype=np.int64))
        counter = np.zeros((4, num_values), dtype=np.uint32)
        counter[0] = self.offset
        counter[2] = np.arange(num_values, dtype=np.uint32)
        self.offset += 1
        key = np.array([[self.seed & 0xFFFFFFFF], [self.seed >> 32]], dtype=np.uint64).astype(np.uint32)
        words = philox_4x32(counter, np.broadcast_to(key, (2, num_values)))
        radius = np.sqrt(-2.0 * np.log(words[0] * _UNIT + _UNIT / 2))
        angle = words[1] * _TURN + _TURN / 2
        normal: npt.NDArray[np.float32] = (radius * np.sin(angle)).reshape(tuple(shape)).astype(np.float32)
        return normal
