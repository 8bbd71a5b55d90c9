"""Rows of a network call. Reference: the full call, row by row."""

from __future__ import annotations

from pathlib import Path

import torch

from backend.nn.network_call import NetworkCall
from backend.nn.unet_program import build_program
from tests.support.checkpoints import build_models

NUM_PICTURES, COND, UNCOND = 2, 0, 1


def _call() -> NetworkCall:
    """Two pictures, the negative branch first."""
    generator = torch.Generator().manual_seed(2)
    return NetworkCall(
        rows={
            "x": torch.randn(4, 4, 8, 8, generator=generator),
            "timesteps": torch.tensor([900.0, 900, 900, 900]),
            "context": torch.randn(4, 77, 64, generator=generator),
        },
        control={"output": [torch.arange(4.0).view(4, 1, 1, 1), None], "middle": [torch.ones(1, 1, 1, 1)], "note": "no list"},  # type: ignore[dict-item]
        options={
            "cond_or_uncond": [UNCOND, COND],
            "sigmas": torch.tensor([3.0, 4.0]),
            "cond_mark": torch.tensor([1.0, 1, 0, 0]),
            "cond_indices": [2, 3],
            "uncond_indices": [0, 1],
            "patches": {},
        },
    )


def test_all_rows_are_the_call_itself() -> None:
    call = _call()
    assert call.take_rows(0, 4) is call


def test_one_row_is_described_as_what_it_is() -> None:
    row = _call().take_rows(3, 4)
    assert row.options["cond_or_uncond"] == [COND]
    assert row.options["cond_indices"] == [0]
    assert row.options["uncond_indices"] == []
    assert row.options["cond_mark"].tolist() == [0.0]
    assert row.options["sigmas"].tolist() == [4.0]
    assert row.options["patches"] == {}


def test_a_whole_branch_keeps_its_chunk() -> None:
    branch = _call().take_rows(0, 2)
    assert branch.options["cond_or_uncond"] == [UNCOND]
    assert branch.options["uncond_indices"] == [0, 1]
    assert branch.options["sigmas"].tolist() == [3.0, 4.0]


def test_residuals_follow_their_rows_and_single_ones_count_for_all() -> None:
    control = _call().take_rows(1, 3).control
    assert control is not None
    residual, nothing = control["output"]
    assert residual is not None
    assert residual.flatten().tolist() == [1.0, 2.0]
    assert nothing is None
    assert control["middle"][0] is not None
    assert set(control) == {"output", "middle"}


@torch.no_grad()
def test_the_network_gives_every_row_the_same_result_as_in_the_full_call() -> None:
    program, call = build_program(build_models(Path("none"), "sd15").unet), _call()
    call = NetworkCall(rows=call.rows, options=call.options)
    whole = program.run(call.start(program))
    rows = torch.cat([program.run(part.start(program)) for part in (call.take_rows(0, 1), call.take_rows(1, 4))])
    assert torch.allclose(rows, whole, atol=1e-5)


def test_a_call_stays_on_its_device_or_is_sent_completely() -> None:
    call, sent = _call(), []

    def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(device)
        return tensor.to(device)

    assert call.on(torch.device("cpu"), send) is call
    moved = call.on(torch.device("meta"), send)
    assert moved.device.type == "meta"
    assert len(sent) == 3
    assert moved.control is call.control
