"""Runs all tiles of a row in one thread, in turns: the code of tiles without workers, messages and slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backend.nn.network_call import NetworkCall
from backend.nn.program import Program
from backend.nn.tiles import Awaited, Cut, Swaps, Tensors, Tile


@dataclass
class LocalPeers:
    """Peers that share a dictionary of messages: (number, sender, receiver) -> tensors."""

    rank: int
    count: int
    messages: dict[tuple[int, int, int], Tensors]
    num_posts: int = 0
    arrived_bytes: dict[int, int] = field(default_factory=dict)

    def post(self, outgoing: Mapping[int, Tensors]) -> Awaited:
        self.num_posts += 1
        for peer, tensors in outgoing.items():
            self.messages[self.num_posts, self.rank, peer] = tensors
        return Awaited(self.num_posts, tuple(outgoing))


def run_in_turns(
    make_work: Callable[[LocalPeers], Swaps[Any]], count: int, *, backwards: bool = False
) -> tuple[list[Any], list[LocalPeers], list[int]]:
    """Results of all tiles, their peers, and the bytes that each received."""
    messages: dict[tuple[int, int, int], Tensors] = {}
    peers = [LocalPeers(rank, count, messages) for rank in range(count)]
    works = [make_work(one) for one in peers]
    waits: list[Awaited | None] = [next(work) for work in works]
    results: list[Any] = [None] * count
    received_bytes = [0] * count
    while any(wait is not None for wait in waits):
        for rank in reversed(range(count)) if backwards else range(count):
            wait = waits[rank]
            if wait is None:
                continue
            keys = {peer: (wait.number, peer, rank) for peer in wait.peers}
            if any(key not in messages for key in keys.values()):
                continue
            got = {peer: messages.pop(key) for peer, key in keys.items()}
            received_bytes[rank] += sum(tensor.nbytes for tensors in got.values() for tensor in tensors)
            try:
                waits[rank] = works[rank].send(got)
            except StopIteration as stop:
                waits[rank], results[rank] = None, stop.value
    assert not messages
    return results, peers, received_bytes


@torch.no_grad()
def run_program_in_tiles(program: Program, call: NetworkCall, rows: Sequence[int]) -> tuple[Tensor, list[LocalPeers], list[int]]:
    """The network's output computed in tiles of these many rows."""
    cut = Cut.of_rows(rows)
    residuals = program.name_residuals(call.control)  # type: ignore[arg-type]

    def work(peers: LocalPeers) -> Swaps[Tensor]:
        tile = Tile(peers, cut)
        state = program.start_tile(call.rows, tile, options=call.options)
        for addition, residual in residuals.items():
            part = program.residual_of_tile(residual, cut, peers.rank)
            if part is not None:
                state.residuals[addition] = part
        for segment in program.segments:
            yield from segment.run_tile(state, tile)
        return state.tensors[program.output]

    parts, peers, received_bytes = run_in_turns(work, len(rows))
    return torch.cat(parts, dim=2), peers, received_bytes
