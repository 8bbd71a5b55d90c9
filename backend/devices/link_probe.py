"""The link test's subprocess: copies random bytes from card to card, compares what arrived, and times it. Started by `link_test`.

A broken link may hang a process or corrupt its CUDA context for good, hence the subprocess. It reads the pairs to test as JSON from standard
input and writes a line of JSON before and after each. It imports none of our modules.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

CHECKED_BYTES = (1, 1021, 64 * 2**10, 2**20 + 7, 16 * 2**20, 48 * 2**20 + 13)
"""Small copies take a different path in the driver than large ones; odd sizes leave a remainder."""
NUM_CHECKS = 3
TIMED_BYTES = 32 * 2**20
NUM_TIMED = 5


def main() -> None:
    """Test the pairs named on standard input, one after another."""
    for source, target in json.load(sys.stdin)["pairs"]:
        _say({"begin": [source, target]})
        _say({"pair": [source, target], **probe_pair(torch.device("cuda", source), torch.device("cuda", target))})


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def probe_pair(source: torch.device, target: torch.device) -> dict[str, Any]:
    """Results for one ordered pair: `peer` (the driver offers it), `wrong_bytes`, and the speeds of a peer copy and of a copy through main memory."""
    peer = torch.cuda.can_device_access_peer(source, target)
    found: dict[str, Any] = {"peer": peer, "wrong_bytes": 0, "staged": time_staged(source, target)}
    if peer:
        found["wrong_bytes"] = sum(count_wrong_bytes(source, target, size, seed) for size, seed in _checks())
        found["direct"] = _time(lambda x: x.to(target, non_blocking=True), source, (source, target))
    return found


def _checks() -> Iterator[tuple[int, int]]:
    return ((size, seed) for size in CHECKED_BYTES for seed in range(NUM_CHECKS))


def count_wrong_bytes(source: torch.device, target: torch.device, num_bytes: int, seed: int) -> int:
    """Bytes that differ after main memory -> source -> target -> main memory. The target has different bytes beforehand."""
    sent = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    at_source, at_target = sent.to(source), (255 - sent).to(target)
    at_target.copy_(at_source, non_blocking=True)
    return int((at_target.cpu() != sent).sum())


def time_staged(source: torch.device, target: torch.device) -> dict[str, float]:
    """Speed of a copy through page-locked memory. Both halves overlap, so the slower one counts; latencies add up."""
    down = _time(lambda x: _pinned_like(x).copy_(x, non_blocking=True), source, (source,))
    up = _time(lambda x: x.to(target, non_blocking=True), torch.device("cpu"), (target,))
    return {"bytes_per_ms": min(down["bytes_per_ms"], up["bytes_per_ms"]), "latency_ms": down["latency_ms"] + up["latency_ms"]}


def _pinned_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)


def _time(copy: Callable[[torch.Tensor], torch.Tensor], source: torch.device, devices: tuple[torch.device, ...]) -> dict[str, float]:
    """Latency from the fastest of several small copies, speed from the fastest of several large ones."""
    latency_ms, large_ms = (_shortest_ms(copy, _make(size, source), devices) for size in (1024, TIMED_BYTES))
    return {"latency_ms": latency_ms, "bytes_per_ms": TIMED_BYTES / max(large_ms - latency_ms, 1e-6)}


def _make(num_bytes: int, device: torch.device) -> torch.Tensor:
    made = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return made.pin_memory() if device.type == "cpu" else made


def _shortest_ms(copy: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, devices: tuple[torch.device, ...]) -> float:
    times_ms = []
    for _ in range(NUM_TIMED + 1):
        _synchronize(devices)
        began_s = time.perf_counter()
        copy(x)
        _synchronize(devices)
        times_ms.append(1000 * (time.perf_counter() - began_s))
    return min(times_ms[1:])


def _synchronize(devices: tuple[torch.device, ...]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
