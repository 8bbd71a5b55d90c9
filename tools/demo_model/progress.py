"""Resumable training: one file per stage, written to a temporary file and moved into place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write `state` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


@dataclass(slots=True)
class StageClock:
    """Progress of a stage: optimizer steps and seconds, over all its runs."""

    step: int = 0
    spent_s: float = 0.0
    limit_s: float | None = None

    def fraction(self, num_steps: int) -> float:
        by_time = self.spent_s / self.limit_s if self.limit_s else 0.0
        return max(self.step / num_steps, by_time)


def cosine_rate(rate: float, fraction: float, *, warm_up: float = 0.02, floor: float = 0.02) -> float:
    """Linear warm-up, then half a cosine down to `floor` of the rate."""
    return rate * min(1.0, (fraction + 1e-4) / warm_up) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))))


class Ema:
    """Exponential moving average of a module's parameters, stored in fp32."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        self.module, self.decay, self.num_updates = module, decay, 0
        self.shadow = {name: value.detach().clone().float() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, value in self.module.state_dict().items():
            self.shadow[name].lerp_(value.float(), 1 - decay)


def iterate_steps(
    name: str, start: StageClock, num_steps: int, save: Callable[[StageClock], None], *, save_every_s: float = 120.0
) -> Iterator[tuple[float, tqdm]]:
    """Yield (completed fraction of the stage, progress bar) per step; calls `save(clock)` every two minutes and at the end.

    The stage ends after `num_steps`, or after `start.limit_s` seconds of training over all its runs, whichever comes first. The fraction follows
    whichever is further along, so that learning rates reach their end even on a busy machine.
    """
    clock = StageClock(start.step, start.spent_s, start.limit_s)
    saved_at = time.monotonic()
    with tqdm(initial=clock.step, total=num_steps, desc=name, mininterval=10, dynamic_ncols=True) as bar:
        while (fraction := clock.fraction(num_steps)) < 1:
            began = time.monotonic()
            yield fraction, bar
            clock.step += 1
            clock.spent_s += time.monotonic() - began
            bar.update()
            if time.monotonic() - saved_at > save_every_s:
                save(clock)
                saved_at = time.monotonic()
    save(clock)


class LossLog:
    """A stage's loss as a file of lines "seconds,step,mean loss of the last hundred steps", counted from this run's start."""

    def __init__(self, path: Path, *, every: int = 100) -> None:
        self.path, self.every, self.num_steps, self.mean = path, every, 0, 0.0
        self._began_s, self._losses = time.monotonic(), []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, loss: torch.Tensor) -> float:
        """Add one step's loss, a tensor read when the device has it; returns the last written mean."""
        self._losses.append(loss)
        self.num_steps += 1
        if self.num_steps in (10, self.every) or self.num_steps % self.every == 0:
            self.mean = float(torch.stack(self._losses).mean())
            self._losses.clear()
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(f"{time.monotonic() - self._began_s:.1f},{self.num_steps},{self.mean:.5f}\n")
        return self.mean
