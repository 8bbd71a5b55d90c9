"""A Flux.1 transformer in layers over virtual GPUs that do not hold it: each slot keeps what it can and streams the rest of its own stage.

Reference: the same rows one by one on one CPU slot. Virtual GPUs count every byte and refuse one too many.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.memory.module_bytes import count_module_bytes
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning import planner
from backend.parallel.running.session import SamplingSession, begin_session, end_session
from backend.patcher.unet import UnetPatcher
from tests.backend.families.test_flux_split import SHAPE, make_inputs, make_patcher, request, whole
from tests.support.fleets import virtual_fleet

WIDE = {"num_attention_heads": 12, "num_single_layers": 6}
"""A network of 24 MB: plans expect 512 tokens of text, whose activations must be small compared with the weights."""
WORKING_BYTES = 6 * 2**20
"""A row's activations with as much text, and the state at the cuts."""


def cap_bytes(share: float, num_slots: int = 2, **network: Any) -> int:
    """A cap at which `num_slots` slots together have room for this share of the network's weights, besides what a row needs."""
    return WORKING_BYTES + int(share * count_module_bytes(make_patcher(**WIDE, **network).model).total_bytes / num_slots)


def begin(unet: UnetPatcher, strategy: str = "auto") -> SamplingSession:
    session = begin_session(unet, SHAPE, request(strategy))
    assert session is not None
    return session


def run(unet: UnetPatcher) -> torch.Tensor:
    return unet.model.apply_model(**make_inputs(unet.load_device)).cpu()


def resident_bytes(fleet: Fleet, slot: int) -> int:
    device = fleet.device(slot)
    return sum(entry.inclusive_memory for entry in memory_management.current_store().residents if entry.device == device)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_layers_that_stream_give_the_very_bits_of_one_slot(num_slots: int, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For three jobs: the same plan each time, nothing moved between them, no slot over its cap, and as many bytes copied as the plan says."""
    monkeypatch.setattr(planner, "_BYTES_STEP", 2**14)  # made for cards, not for slots of a few megabytes
    with virtual_fleet(num_slots, cap_bytes(0.9 if lora else 0.8, num_slots)) as fleet:
        unet, reference = make_patcher(fleet, lora, **WIDE), whole(lora, **WIDE)
        for _ in range(3):
            session = begin(unet)
            plan = session.plan
            assert plan.is_one_cut and plan.streamed and len(plan.used_slots) == num_slots and "stream" in plan.reason
            run(unet)
            virtual_gpu.reset_copied_bytes()
            assert torch.equal(run(unet), reference)
            copied = virtual_gpu.copied_bytes()
            for slot, one in plan.streamed.items():
                assert virtual_gpu.get_device(slot).peak_bytes <= cap_bytes(0.9 if lora else 0.8, num_slots)
                fetched = copied.get(("cpu", f"vgpu:{slot}"), 0)
                assert SHAPE[0] * 0.5 * one.streamed_bytes <= fetched <= SHAPE[0] * 1.5 * one.streamed_bytes + 30_000
                assert resident_bytes(fleet, slot) <= one.budget_bytes
            end_session(unet)


def test_weights_in_fp8_stream_as_they_are() -> None:
    dtype = torch.float8_e4m3fn
    with virtual_fleet(2, cap_bytes(0.7, dtype=dtype)) as fleet:
        unet = make_patcher(fleet, dtype=dtype, **WIDE)
        plan = begin(unet).plan
        assert plan.is_one_cut and plan.streamed
        assert torch.equal(run(unet), whole(dtype=dtype, **WIDE))
        end_session(unet)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_slot_that_runs_out_of_memory_streams_more(slot: int, caplog: pytest.LogCaptureFixture) -> None:
    """Two shortages: after the first idle models leave, after the second the slot holds less. The rows are the same."""
    with virtual_fleet(2, cap_bytes(0.9)) as fleet:
        unet = make_patcher(fleet, lora=True, **WIDE)
        session = begin(unet)
        before = session.plan
        run(unet)
        device = virtual_gpu.get_device(slot)
        for _ in range(2):
            device.set_faults(Faults(out_of_memory_at=frozenset({40})))
            assert torch.equal(run(unet), whole(lora=True, **WIDE))
        device.set_faults(None)
        after = session.plan
        assert after.is_one_cut and after.streamed
        assert sum(one.streamed_bytes for one in after.streamed.values()) > sum(one.streamed_bytes for one in before.streamed.values())
        assert torch.equal(run(unet), whole(lora=True, **WIDE))
        end_session(unet)
    assert caplog.text.count(f"Out of memory on slot {slot}") == 2


def test_after_a_streaming_plan_the_weights_are_all_there(caplog: pytest.LogCaptureFixture) -> None:
    """From layers that stream to a card that holds all of it, and back to the host, without a lost or changed number."""
    caplog.set_level(logging.INFO)
    with virtual_fleet(2, cap_bytes(0.8)) as fleet:
        unet = make_patcher(fleet, **WIDE)
        before = {name: tensor.clone() for name, tensor in make_patcher(**WIDE).model.state_dict().items()}
        begin(unet)
        run(unet)
        end_session(unet)
        memory_management.unload_all_models()
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in unet.model.state_dict().items())
        assert {str(tensor.device) for tensor in unet.model.parameters()} == {"cpu"}
    assert "of whose weights" in caplog.text
