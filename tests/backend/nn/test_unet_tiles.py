"""UNets computed in tiles equal the whole. Reference: the program on one device, which is diffusers' own forward bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backend.nn.network_call import NetworkCall
from backend.nn.tiles import CannotTile, Cut, divide_into_tiles
from backend.nn.unet_program import UNetProgram, build_program
from tests.support.checkpoints import build_models
from tests.support.tiles import run_program_in_tiles

FAMILIES = ["sd15", "sd20", "sdxl"]


@pytest.fixture(scope="module")
def programs() -> dict[str, UNetProgram]:
    """In fp64, so that only a wrong row or sum is visible."""
    found = {}
    for family in FAMILIES:
        unet = build_models(Path("none"), family).unet
        nn.Module.to(unet, torch.float64)
        found[family] = build_program(unet)
    return found


def make_call(program: UNetProgram, height: int, width: int, *, rows: int = 1, options: dict[str, Any] | None = None) -> NetworkCall:
    config: Any = program.embedding.unet.config
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": draw(rows, config.in_channels, height, width),
        "timesteps": torch.tensor([900.0, 20.0])[:rows],
        "context": draw(rows, 77, config.cross_attention_dim),
    }
    if config.projection_class_embeddings_input_dim is not None:
        inputs["y"] = draw(rows, config.projection_class_embeddings_input_dim)
    return NetworkCall(rows=inputs, options=options or {})


@torch.no_grad()
def run_whole(program: UNetProgram, call: NetworkCall) -> Tensor:
    return program.run(call.start(program))


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width", "tiles"), [(27, 13, (12, 15)), (32, 9, (8, 9, 15)), (32, 5, (8, 8, 8, 8))])
def test_tiles_are_the_whole(programs: dict[str, UNetProgram], family: str, height: int, width: int, tiles: tuple[int, ...]) -> None:
    """Even and odd sizes, even and uneven shares, borders at even and at odd rows, two to four tiles."""
    program = programs[family]
    call = make_call(program, height, width, rows=2 if len(tiles) == 2 else 1)
    found, _, _ = run_program_in_tiles(program, call, tiles)
    assert_same(found, run_whole(program, call))


@given(height=st.integers(16, 36), width=st.integers(3, 8), speeds=st.lists(st.sampled_from((0.3, 0.6, 1.0)), min_size=2, max_size=4), data=st.data())
@settings(max_examples=6)
def test_any_size_and_any_shares(programs: dict[str, UNetProgram], height: int, width: int, speeds: list[float], data: Any) -> None:
    program = programs["sdxl"]
    call = make_call(program, height, width)
    unit = program.tile_traffic(call.rows).unit
    tiles = list(divide_into_tiles(height, speeds, unit))
    moved = data.draw(st.integers(0, tiles[0] - unit))
    found, _, _ = run_program_in_tiles(program, call, (tiles[0] - moved, tiles[1] + moved, *tiles[2:]))
    assert_same(found, run_whole(program, call))


def test_residuals_of_controlnets(programs: dict[str, UNetProgram]) -> None:
    """Each tile adds its rows of each residual, at every level; one of another size is ignored by all."""
    program = programs["sd15"]
    call = make_call(program, 27, 13)
    shapes: list[torch.Size] = []

    def note(hidden: Tensor, skip: Tensor, options: object) -> tuple[Tensor, Tensor]:
        shapes.append(skip.shape)
        return hidden, skip

    run_whole(program, NetworkCall(rows=call.rows, options={"patches": {"output_block_patch": [note]}}))
    generator = torch.Generator().manual_seed(5)
    output: list[Tensor | None] = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes[::-1]]
    output[2] = torch.ones(1, 3, 5, 7)
    controlled = NetworkCall(rows=call.rows, control={"output": output, "middle": [torch.ones(shapes[0], dtype=torch.float64)]})
    expected = run_whole(program, controlled)
    assert not torch.allclose(expected, run_whole(program, call))
    found, _, _ = run_program_in_tiles(program, controlled, (12, 15))
    assert_same(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_crosses_is_what_the_planner_counts(programs: dict[str, UNetProgram], family: str) -> None:
    program = programs[family]
    call = make_call(program, 32, 16)
    traffic = program.tile_traffic(call.rows)
    tiles = (16, 8, 8)
    _, peers, received_bytes = run_program_in_tiles(program, call, tiles)
    assert [one.num_posts for one in peers] == [traffic.num_exchanges] * 3
    for counted, predicted in zip(received_bytes, traffic.arriving_bytes(tiles, 8)):
        assert predicted * 0.85 <= counted <= predicted  # where sizes halve or double, only one neighbor sends a row


def test_a_layer_with_hooks_is_called_as_a_module(programs: dict[str, UNetProgram]) -> None:
    """A weight that streams in or gets a side-branch LoRA changes what the layer computes; tiles must not go around it."""
    program = programs["sd15"]
    call = make_call(program, 16, 8)
    convs = [layer for layer in program.embedding.unet.modules() if isinstance(layer, nn.Conv2d)]
    handles = [conv.register_forward_hook(lambda layer, args, output: output * 1.01) for conv in convs]
    try:
        expected = run_whole(program, call)
        found, _, _ = run_program_in_tiles(program, call, (8, 8))
        assert_same(found, expected)
    finally:
        for handle in handles:
            handle.remove()
    assert not torch.allclose(expected, run_whole(program, call))


def test_what_cannot_be_cut_is_named(programs: dict[str, UNetProgram]) -> None:
    program = programs["sd15"]
    assert program.why_no_tiles() is None
    conv: Any = program.embedding.unet.up_blocks[1].resnets[0].conv1
    conv.padding_mode = "circular"
    try:
        assert "up_blocks.1.resnets.0.conv1 pads its edges circular" in str(program.why_no_tiles())
    finally:
        conv.padding_mode = "zeros"
    resnet: Any = program.embedding.unet.mid_block.resnets[0]
    resnet.forward = resnet.forward
    try:
        assert "mid_block.resnets.0 has been changed" in str(program.why_no_tiles())
    finally:
        del resnet.forward


# shares


@given(length=st.integers(1, 200), speeds=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=5), unit=st.sampled_from((1, 4, 8)))
def test_shares_are_fair_and_none_is_empty_at_the_deepest_level(length: int, speeds: list[float], unit: int) -> None:
    if length < unit * len(speeds):
        with pytest.raises(CannotTile, match=f"{length} rows"):
            divide_into_tiles(length, speeds, unit)
        return
    rows = divide_into_tiles(length, speeds, unit)
    assert sum(rows) == length
    deepest = Cut.of_rows(rows).begins(unit.bit_length() - 1)
    assert all(start < end for start, end in pairwise(deepest))
    assert divide_into_tiles(64, (1.0, 0.6), 8) == (40, 24)


def test_a_slow_slot_gets_no_more_than_it_must() -> None:
    assert divide_into_tiles(64, (1.0, 0.01), 8) == (56, 8)
