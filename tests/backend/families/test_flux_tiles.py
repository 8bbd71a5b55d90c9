"""Flux.1 computed in tiles equals the whole. Reference: the program on one device, which is diffusers' own forward bit for bit in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.families.flux.program import FluxProgram, build_flux_program
from backend.nn.network_call import NetworkCall
from tests.support.flux_networks import CONFIG, make_flux
from tests.support.tiles import run_program_in_tiles


@pytest.fixture(scope="module")
def program() -> FluxProgram:
    """In fp64, so that only a wrong token is visible; its RoPE tables are fp32 in both."""
    return build_flux_program(nn.Module.to(make_flux(), torch.float64))


def make_call(program: FluxProgram, height: int, width: int, *, rows: int = 1, dtype: torch.dtype = torch.float64) -> NetworkCall:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "x": draw(rows, CONFIG["in_channels"] // 4, height, width),
        "timesteps": torch.tensor([0.9, 0.2])[:rows],
        "context": draw(rows, 7, CONFIG["joint_attention_dim"]),
        "y": draw(rows, CONFIG["pooled_projection_dim"]),
        "guidance": torch.tensor([3.5]),
    }
    return NetworkCall(rows=inputs)


@torch.no_grad()
def run_whole(program: FluxProgram, call: NetworkCall) -> Tensor:
    return program.run(call.start(program))


@pytest.mark.parametrize(("height", "width", "tiles"), [(16, 12, (4, 4)), (15, 9, (3, 5)), (10, 8, (1, 1, 3)), (16, 8, (3, 1, 2, 2))], ids=str)
def test_tiles_are_the_whole(program: FluxProgram, height: int, width: int, tiles: tuple[int, ...]) -> None:
    call = make_call(program, height, width, rows=2)
    expected = run_whole(program, call)
    found, peers, received_bytes = run_program_in_tiles(program, call, tiles)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))
    traffic = program.tile_traffic(call.rows)
    assert [one.num_posts for one in peers] == [traffic.num_exchanges] * len(tiles)
    for counted, predicted in zip(received_bytes, traffic.arriving_bytes(tiles, 8)):
        assert counted == pytest.approx(2 * predicted, rel=0.1)  # text is cut at whole tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_tiles_are_as_exact_as_the_whole(dtype: torch.dtype) -> None:
    """Against fp64 of the same rounded weights; fp16 has its streams in fp32."""
    half = build_flux_program(nn.Module.to(make_flux(), dtype))
    truth_program = build_flux_program(nn.Module.to(nn.Module.to(make_flux(), dtype), torch.float64))
    call = make_call(half, 16, 12, dtype=dtype)
    rows = {name: one.double() if one.is_floating_point() and name not in ("timesteps", "guidance") else one for name, one in call.rows.items()}
    truth = run_whole(truth_program, NetworkCall(rows=rows))
    whole = run_whole(half, call)
    found, _, _ = run_program_in_tiles(half, call, (5, 3))
    assert found.dtype == whole.dtype
    far, near = ((one.double() - truth).square().mean().sqrt() for one in (whole, found))
    assert near <= 1.5 * far + torch.finfo(dtype).eps * truth.std()


def test_residuals_reach_their_tokens(program: FluxProgram) -> None:
    call = make_call(program, 12, 8)
    width, generator = program.embedding.network.inner_dim, torch.Generator().manual_seed(3)
    residuals: dict[str, list[Tensor | None]] = {
        "input": [torch.randn(1, 24, width, generator=generator).double() for _ in range(2)],
        "output": [None, torch.randn(1, 24, width, generator=generator).double()],
    }
    controlled = NetworkCall(rows=call.rows, control=residuals)
    expected = run_whole(program, controlled)
    assert not torch.allclose(expected, run_whole(program, call))
    found, _, _ = run_program_in_tiles(program, controlled, (2, 4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))


def test_what_cannot_be_cut_is_named(program: FluxProgram) -> None:
    assert program.why_no_tiles() is None
    block: Any = program.embedding.network.single_transformer_blocks[1]
    block.forward = block.forward
    try:
        assert "single_transformer_blocks.1 has been changed" in str(program.why_no_tiles())
    finally:
        del block.forward
