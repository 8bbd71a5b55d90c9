"""One GPU as two slots that compute each row in tiles: numbers against the whole row, repeatedly, and what the exchanges cost.

Both slots are on one card, so nothing is copied: streams and events are exercised, and the time above the whole row's is that of launches, waits and
smaller kernels. Two cards are needed for copies.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from backend.families.flux.program import build_flux_program
from backend.nn.network_call import NetworkCall
from backend.nn.program import Program
from backend.parallel.placing.fleet import current_fleet
from backend.parallel.planning.plan import ReplicaPlan, TileTeam
from backend.parallel.running.displaced import DisplacedPasses
from backend.parallel.running.routing import Replica
from backend.parallel.running.tile_executor import TileExecutor
from tools.cuda_checks.machine import Machine, difference
from tools.cuda_checks.networks import build_patcher
from tools.cuda_checks.runner import Report

MOST_OF_SPREAD = 0.1
"""In half precision one batch of two rows differs from one by one by up to 4.4 % of the spread (benchmarks/cuda_checks.md)."""
_FLUX_BLOCKS = (2, 4)
"""Double and single blocks of full width: a tenth of Flux.1, as many exchanges as blocks."""


def check_tiles(machine: Machine, report: Report) -> None:
    """UNets: SD1.5 at 512x512, SDXL at 1024x1024 and 2048x2048, in fp16 and bf16."""
    cases = (("sd15", torch.float16, 512), ("sdxl", torch.float16, 1024), ("sdxl", torch.bfloat16, 1024), ("sdxl", torch.float16, 2048))
    for family, dtype, side in machine.pick(cases, (("sdxl", machine.dtype, 128),)):
        machine.use(2)
        unet = build_patcher(machine, family, dtype)
        _compare(machine, report, unet.model.program, _unet_call(machine, unet, side), f"{family} {dtype} {side}x{side}")
        del unet
        machine.use()
        machine.settle()


def check_flux_tiles(machine: Machine, report: Report) -> None:
    """Blocks of Flux.1's width over the tokens of a picture of 1024x1024 and of its text, in bf16."""
    heads, (doubles, singles), side = machine.pick(24, 2), machine.pick(_FLUX_BLOCKS, (1, 2)), machine.pick(128, 16)
    dtype = torch.bfloat16 if machine.is_cuda else torch.float32
    machine.use(2)
    with torch.device(machine.device):
        network = FluxTransformer2DModel(
            in_channels=64, num_layers=doubles, num_single_layers=singles, num_attention_heads=heads, attention_head_dim=128,
            joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
        )  # fmt: skip
    nn.Module.to(network, dtype).eval().requires_grad_(False)
    draw = _Draw(machine, dtype)
    rows = {
        "x": draw(1, 16, side, side), "timesteps": torch.full((1,), 0.5, device=machine.device), "context": draw(1, 512, 4096), "y": draw(1, 768),
        "guidance": torch.full((1,), 3.5, device=machine.device),
    }  # fmt: skip
    _compare(machine, report, build_flux_program(network), NetworkCall(rows=rows), f"{doubles} double and {singles} single blocks of Flux.1 {dtype}")
    machine.use()


class _Draw:
    """Random tensors on the device, the same every time."""

    def __init__(self, machine: Machine, dtype: torch.dtype) -> None:
        self._generator, self._device, self._dtype = torch.Generator().manual_seed(5), machine.device, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device, self._dtype)


def _unet_call(machine: Machine, unet: Any, side_px: int) -> NetworkCall:
    config, draw = unet.model.diffusion_model.config, _Draw(machine, unet.model.computation_dtype)
    rows = {"x": draw(1, 4, side_px // 8, side_px // 8), "timesteps": torch.full((1,), 500.0, device=machine.device)}
    rows["context"] = draw(1, 77, config.cross_attention_dim)
    width = config.projection_class_embeddings_input_dim
    return NetworkCall(rows=rows if width is None else {**rows, "y": draw(1, width)})


@torch.no_grad()
def _compare(machine: Machine, report: Report, program: Program, call: NetworkCall, what: str) -> None:
    """Even and uneven tiles against the whole, many times, and the times of exact and displaced passes."""
    whole = program.run(call.start(program)).clone()
    whole_ms = machine.median_ms(lambda: program.run(call.start(program)), times=machine.pick(7, 1))
    traffic = program.tile_traffic(call.rows)
    even = traffic.length // 2
    for name, rows in (("even", (even, traffic.length - even)), ("uneven", (traffic.length - traffic.unit, traffic.unit))):
        executor = _executor(program, rows)
        outputs = [executor.run(call).clone() for _ in range(machine.pick(20, 2))]
        machine.sync()
        diff = difference(outputs[0], whole)
        report.expect(f"{what}, {name} tiles {rows}: near the whole", diff["max_of_spread"] < MOST_OF_SPREAD, **diff)
        num_other = sum(not torch.equal(output, outputs[0]) for output in outputs)
        report.expect(f"{what}, {name} tiles: {len(outputs)} times the same bits", num_other == 0, differing=num_other)
        step_ms = machine.median_ms(lambda executor=executor: executor.run(call), times=machine.pick(7, 1))  # type: ignore[misc]
        executor.close()
        per_exchange_ms = (step_ms - whole_ms) / traffic.num_exchanges
        report.value(
            f"{what}, {name} tiles: both on one card", whole_ms=round(whole_ms, 2), tiles_ms=round(step_ms, 2), exchanges=traffic.num_exchanges,
            ms_per_exchange=round(per_exchange_ms, 4),
        )  # fmt: skip
    displaced = _executor(program, (even, traffic.length - even), DisplacedPasses(1))
    repeated = [displaced.run(call).clone() for _ in range(3)]
    diff = difference(repeated[-1], whole)
    report.expect(f"{what}: a displaced pass of the same input is near the whole", diff["max_of_spread"] < MOST_OF_SPREAD, **diff)
    step_ms = machine.median_ms(lambda: displaced.run(call), times=machine.pick(7, 1))
    displaced.close()
    report.value(f"{what}: displaced", tiles_ms=round(step_ms, 2), **machine.peak_gb())


def _executor(program: Program, rows: tuple[int, int], displaced: DisplacedPasses | None = None) -> TileExecutor:
    """Both slots share the network, as they share the card."""
    pieces = program.whole_pieces()
    replicas = [Replica(program=program, plan=ReplicaPlan(pieces=pieces, slots=(slot,) * len(pieces))) for slot in (0, 1)]
    return TileExecutor(replicas, [TileTeam(slots=(0, 1), rows=rows)], current_fleet(), deal=lambda num_rows: (num_rows,), displaced=displaced)
