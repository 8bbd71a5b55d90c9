"""Do two CPU slots with one thread each really work in parallel? Two independent batches on one slot and on two."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from backend.devices.slot import Slot
from backend.parallel.running.worker import SlotWorker
from tools.measure import Bench, Metrics, Variant

CHANNELS, SIDE, NUM_REPEATS = 128, 32, 12


class _Block(nn.Module):
    """A UNet's main work: a 3x3 convolution with its norm, then a wide, gated linear layer over the same pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(32, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.wide, self.narrow = nn.Linear(CHANNELS, 8 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = x_BCHW + self.conv(nn.functional.silu(self.norm(x_BCHW)))
        tokens_BLC = x_BCHW.flatten(2).transpose(1, 2)
        wide_BLD, gate_BLD = self.wide(tokens_BLC).chunk(2, dim=-1)
        tokens_BLC = tokens_BLC + self.narrow(wide_BLD * nn.functional.gelu(gate_BLD))
        return tokens_BLC.transpose(1, 2).reshape(x_BCHW.shape)


def _work(block: _Block, x_BCHW: torch.Tensor) -> torch.Tensor:
    for _ in range(NUM_REPEATS):
        x_BCHW = block(x_BCHW)
    return x_BCHW


def _run(workers: Sequence[SlotWorker], batches: Sequence[torch.Tensor], block: _Block) -> Metrics:
    began_s = time.process_time()
    futures = [workers[index % len(workers)].submit(_work, block, batch) for index, batch in enumerate(batches)]
    for future in futures:
        future.result()
    return {"CPU s": time.process_time() - began_s}


def _make_variants() -> Mapping[str, Variant]:
    torch.set_num_threads(1)
    workers = [SlotWorker(Slot(index, torch.device("cpu"), "CPU", 2**30, cpu_threads=1)) for index in range(2)]
    block, generator = _Block().eval(), torch.Generator().manual_seed(0)
    batches = [torch.randn(2, CHANNELS, SIDE, SIDE, generator=generator) for _ in workers]
    return {"one slot": partial(_run, workers[:1], batches, block), "two slots": partial(_run, workers, batches, block)}


BENCH = Bench(
    question="Do two CPU slots with one thread each really work in parallel? Two batches of 12 blocks of convolution, norm and gated linear layers "
    "(128 channels, 32x32, batch 2, fp32), both on one slot's worker and one on each of two.",
    make_variants=_make_variants,
    baseline="one slot",
    num_rounds=15,
    num_warmups=2,
)
