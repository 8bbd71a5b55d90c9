"""Z-Image and Lumina2 computed in tiles equal the whole. Reference: diffusers' own forward, row by row, in fp64 except for its rotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.families.lumina2.program import build_lumina2_program
from backend.families.zimage.program import build_zimage_program
from backend.nn.network_call import NetworkCall
from backend.nn.padded_text import TEXT_LENGTHS
from backend.nn.program import Program
from backend.nn.stream_tiles import join_spans, share_out, share_rows
from backend.nn.tiles import Cut
from tests.support import lumina2_networks, zimage_networks
from tests.support.tiles import run_program_in_tiles

LENGTHS = [40, 5]
"""Of two texts. Z-Image pads them to 64 and 32 tokens."""


def _zimage() -> tuple[Any, Program]:
    network = nn.Module.to(zimage_networks.make_zimage(), torch.float64)
    pads = nn.Module()
    pads.picture, pads.text = network.x_pad_token, network.cap_pad_token
    network.pads = pads
    return network, build_zimage_program(network)


def _lumina2() -> tuple[Any, Program]:
    network = nn.Module.to(lumina2_networks.make_lumina2(), torch.float64)
    return network, build_lumina2_program(network)


MAKERS: dict[str, Callable[[], tuple[Any, Program]]] = {"zimage": _zimage, "lumina2": _lumina2}


@pytest.fixture(scope="module", params=list(MAKERS))
def family(request: pytest.FixtureRequest) -> tuple[str, Any, Program]:
    return (request.param, *MAKERS[request.param]())


def make_call(height: int, width: int, lengths: list[int]) -> NetworkCall:
    generator = torch.Generator().manual_seed(5)
    rows = {
        "x": torch.randn(len(lengths), 16, height, width, generator=generator, dtype=torch.float64),
        "timesteps": torch.tensor([0.75, 0.3])[: len(lengths)],
        "context": torch.randn(len(lengths), max(lengths), zimage_networks.TEXT_WIDTH, generator=generator, dtype=torch.float64),
        TEXT_LENGTHS: torch.tensor(lengths),
    }
    return NetworkCall(rows=rows)


@torch.no_grad()
def run_whole(program: Program, call: NetworkCall) -> Tensor:
    return program.run(call.start(program))


@pytest.mark.parametrize(
    ("height", "width", "lengths", "tiles"),
    [(8, 6, [40], (2, 2)), (9, 6, LENGTHS, (1, 4)), (7, 5, LENGTHS, (2, 1, 1)), (12, 4, [5], (3, 1, 1, 1))],
    ids=str,
)
def test_tiles_are_the_whole(family: tuple[str, Any, Program], height: int, width: int, lengths: list[int], tiles: tuple[int, ...]) -> None:
    """Odd sizes, uneven shares, two to four tiles, rows with texts of the same and of different lengths."""
    _, _, program = family
    assert program.why_no_tiles() is None
    call = make_call(height, width, lengths)
    expected = run_whole(program, call)
    found, peers, received_bytes = run_program_in_tiles(program, call, tiles)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))
    traffic = program.tile_traffic(call.rows)
    assert [one.num_posts for one in peers] == [traffic.num_exchanges] * len(tiles)
    predicted = sum(traffic.arriving_bytes(tiles, 8))
    assert sum(received_bytes) == pytest.approx(len(lengths) * predicted, rel=0.1)


@torch.no_grad()
def test_tiles_are_the_library(family: tuple[str, Any, Program]) -> None:
    name, network, program = family
    call = make_call(8, 6, [40])
    x, text, times = call.rows["x"], call.rows["context"], call.rows["timesteps"]
    if name == "zimage":
        expected = zimage_networks.library_flow(network, x, [text[0]], times)
    else:
        expected = lumina2_networks.library_flow(network, x, text, [40], times)
    found, _, _ = run_program_in_tiles(program, call, (3, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.std()))


def test_residuals_reach_their_tokens() -> None:
    _, program = _zimage()
    call, generator = make_call(8, 6, LENGTHS), torch.Generator().manual_seed(3)
    residuals = [torch.randn(2, 12, zimage_networks.WIDTH, generator=generator).double() for _ in range(2)]
    controlled = NetworkCall(rows=call.rows, control={"input": residuals})
    expected = run_whole(program, controlled)
    assert not torch.allclose(expected, run_whole(program, call))
    found, _, _ = run_program_in_tiles(program, controlled, (1, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))


def test_spans_of_a_tile_cover_the_whole_once() -> None:
    cut = Cut.of_rows((1, 2, 1))
    assert share_rows(cut, 3, 16) == (slice(0, 3), slice(3, 9), slice(9, 16)), "the last tile has the padding"
    spans = join_spans(share_out(cut, 5), share_rows(cut, 3))
    whole = torch.arange(spans.length)[None]
    assert spans.take(whole, 1).tolist() == [[1, 2, 8, 9, 10, 11, 12, 13]]
    covered = torch.cat([spans.take(whole, rank) for rank in range(3)], dim=1)
    assert sorted(covered[0].tolist()) == list(range(17))
