"""How much of the machine's cores a benchmark really gets: other processes, and hypervisors, take some without saying so.

Two threads multiply matrices, alone and at the same time. Both at once should take as long as one; on a machine that is busy they take longer.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEAST_SHARE = 0.93
"""Share of its cores below which a machine counts as busy."""
_SIDE, _PRODUCTS, _ROUNDS = 384, 12, 5


@dataclass(frozen=True, slots=True)
class CoreShare:
    """`share`: 1 if `num_threads` threads at once are as fast as one alone, 1 / `num_threads` if they get one core together."""

    share: float
    num_threads: int

    @property
    def is_quiet(self) -> bool:
        return self.share >= LEAST_SHARE

    def __str__(self) -> str:
        cores = self.share * self.num_threads
        return f"{cores:.2f} of {self.num_threads} cores"


def measure_core_share(num_threads: int = 2, work: Callable[[], object] | None = None) -> CoreShare:
    """Time `work` (matrix products on one core) in one thread and in `num_threads` at once, in turns; medians of a few rounds."""
    work = work or _make_work()
    times_s = [(_time_at_once(work, 1), _time_at_once(work, num_threads)) for _ in range(_ROUNDS)]
    return share_of_cores([alone_s for alone_s, _ in times_s], [together_s for _, together_s in times_s], num_threads)


def share_of_cores(alone_s: Sequence[float], together_s: Sequence[float], num_threads: int) -> CoreShare:
    """The share from the times of the same rounds."""
    return CoreShare(min(1.0, statistics.median(alone / together for alone, together in zip(alone_s, together_s))), num_threads)


def wait_for_quiet(
    patience_s: float, *, look: Callable[[], CoreShare] = measure_core_share, sleep: Callable[[float], None] = time.sleep, pause_s: float = 5.0
) -> CoreShare:
    """Wait until the machine is quiet, or until patience ends. Returns the last look."""
    waited_s = 0.0
    seen = look()
    while not seen.is_quiet and waited_s < patience_s:
        sleep(pause_s)
        waited_s += pause_s
        seen = look()
    return seen


def _make_work() -> Callable[[], object]:
    import torch  # heavy

    matrix = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0)) / _SIDE**0.5

    def work() -> object:
        torch.set_num_threads(1)  # of this thread
        product = matrix
        for _ in range(_PRODUCTS):
            product = product @ matrix
        return product

    before = torch.get_num_threads()
    work()
    torch.set_num_threads(before)
    return work


def _time_at_once(work: Callable[[], object], num_threads: int) -> float:
    start = threading.Barrier(num_threads + 1)

    def run() -> None:
        start.wait()
        work()

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    start.wait()
    began_s = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began_s
