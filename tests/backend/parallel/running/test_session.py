"""A sampling run over several slots, and what happens when one fails. Reference: the same call on one slot, row by row."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.parallel.placing.fleet import Fleet, Trial
from backend.parallel.planning.candidate import LEAST_GAIN
from backend.parallel.running.executor import Cancelled, SlotFailure
from backend.parallel.running.sampling_request import foresee_calls
from backend.parallel.running.session import SamplingRequest, begin_session, end_session, find_bound_hook
from backend.parallel.running.worker import SlotLost
from backend.patcher.unet import UnetPatcher
from backend.patcher.weight_patches import unpatched_tensors
from tests.support.checkpoints import build_models
from tests.support.fleets import configured_slots, virtual_fleet

SHAPE = (2, 4, 16, 16)
GIB = 2**30
ATOL = 5e-5
"""Outputs reach 9; a batch of two and two batches of one differ by up to 1.2e-5 where AVX-512 kernels choose other blockings."""


def _unet(fleet: Fleet | None = None, family: str = "sd15") -> UnetPatcher:
    torch.manual_seed(3)
    network = build_models(Path("none"), family).unet
    home = torch.device("cpu") if fleet is None else fleet.primary.torch_device
    return UnetPatcher(KModel(network, Prediction()), home, torch.device("cpu"))


def _inputs(unet: UnetPatcher) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    home = unet.load_device
    return {
        "x": torch.randn(SHAPE, generator=generator).to(home),
        "t": torch.full((SHAPE[0],), 3.0).to(home),
        "c_crossattn": torch.randn(SHAPE[0], 77, 64, generator=generator).to(home),
    }


def _whole(lora: bool = False) -> Tensor:
    unet = _unet()
    if lora:
        _add_lora(unet)
        unet.refresh_loras()
    inputs = _inputs(unet)
    return torch.cat([unet.model.apply_model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}) for row in range(SHAPE[0])])


def _add_lora(unet: UnetPatcher) -> None:
    generator = torch.Generator().manual_seed(8)
    patches = {
        name: ("diff", (torch.randn(parameter.shape, generator=generator) * 0.02,))
        for name, parameter in unet.model.named_parameters()
        if name.endswith(("to_q.weight", "conv1.weight"))
    }
    assert len(unet.add_patches(filename="lora", patches=patches, strength_patch=0.8)) == len(patches) > 20


@pytest.fixture
def two_gpus() -> Iterator[Fleet]:
    with virtual_fleet(2) as fleet:
        yield fleet
        for device in (0, 1):
            virtual_gpu.get_device(device).set_faults(None)


def _request(strategy: Any, **fields: Any) -> SamplingRequest:
    return SamplingRequest(images=SHAPE[0], branches=1, strategy=strategy, **fields)


def test_a_wrapper_that_cuts_pictures_says_what_calls_take() -> None:
    """Nine views of 64x64 of one picture, without CFG, are nine rows, and pictures share their calls."""
    request = SamplingRequest(images=2, branches=1, may_use_lanes=True)
    wrapper = SimpleNamespace(parts_of=lambda height, width: (9, 64, 64))
    shape, seen = foresee_calls(wrapper, (2, 4, 160, 160), request)
    assert (shape, seen.images, seen.num_rows, seen.may_use_lanes) == ((18, 4, 64, 64), 18, 18, False)
    for whole in (None, SimpleNamespace(), SimpleNamespace(parts_of=lambda height, width: (1, height, width))):
        assert foresee_calls(whole, (2, 4, 160, 160), request) == ((2, 4, 160, 160), request)


STRATEGIES = ["replicas", "layers", "single"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
def test_a_run_gives_what_one_slot_gives(two_gpus: Fleet, strategy: str, lora: bool) -> None:
    unet = _unet(two_gpus)
    if lora:
        _add_lora(unet)
    session = begin_session(unet, SHAPE, _request(strategy))
    assert session is not None
    assert session.plan.strategy == strategy
    assert session.is_parallel == (strategy != "single")
    result = unet.model.apply_model(**_inputs(unet))
    end_session(unet)
    assert unet.model.runner is None
    assert torch.allclose(result.cpu(), _whole(lora), atol=ATOL)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_taking_a_lora_out_leaves_every_copy_as_it_was(two_gpus: Fleet, strategy: str) -> None:
    unet = _unet(two_gpus)
    patched = unet.clone()
    _add_lora(patched)
    results = []
    for patcher in (unet, patched, unet):
        begin_session(patcher, SHAPE, _request(strategy))
        results.append(patcher.model.apply_model(**_inputs(patcher)))
        end_session(patcher)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_going_from_plan_to_plan_and_back_moves_no_number(two_gpus: Fleet) -> None:
    unet = _unet(two_gpus)
    before = {name: tensor.clone() for name, tensor in unpatched_tensors(unet.model).items()}
    names = list(unet.model.state_dict())
    for strategy in ("layers", "single", "replicas", "layers", "replicas", "single"):
        begin_session(unet, SHAPE, _request(strategy))
        unet.model.apply_model(**_inputs(unet))
        end_session(unet)
        memory_management.hold_models([])
    memory_management.unload_all_models()
    after = unet.model.state_dict()
    assert list(after) == names
    assert all(torch.equal(after[name].cpu(), before[name]) for name in before)
    weights = [tensor for name, tensor in after.items() if name.startswith("diffusion_model.")]
    assert {tensor.device.type for tensor in weights} == {"cpu"}, "the prediction's tables, some KB, stay where the latents are"
    assert virtual_gpu.get_device(1).live_bytes == 0


def test_a_network_that_fits_no_card_runs_over_two(caplog: pytest.LogCaptureFixture) -> None:
    """33 MiB of weights on cards of 30 MiB."""
    caplog.set_level(logging.INFO)
    with virtual_fleet(2, cap_bytes=30 * 2**20) as fleet:
        unet = _unet(fleet)
        assert memory_management.module_size(unet.model) > 30 * 2**20
        session = begin_session(unet, SHAPE, _request("auto"))
        assert session is not None
        assert session.plan.strategy == "layers"
        result = unet.model.apply_model(**_inputs(unet)).cpu()
        held = [virtual_gpu.get_device(index).live_bytes for index in (0, 1)]
        end_session(unet)
    assert torch.allclose(result, _whole(), atol=ATOL)
    assert min(held) > 0.8 * max(held)
    assert "layers of one copy over slots 0 and 1" in caplog.text


def test_four_small_cards_get_two_copies_of_two_stages() -> None:
    with virtual_fleet(4, cap_bytes=30 * 2**20) as fleet:
        unet = _unet(fleet)
        session = begin_session(unet, SHAPE, _request("hybrid"))
        assert session is not None
        assert session.plan.strategy == "hybrid"
        assert [len(replica.used_slots) for replica in session.plan.replicas] == [2, 2]
        first = unet.model.apply_model(**_inputs(unet)).cpu()
        end_session(unet)
        patched = unet.clone()
        _add_lora(patched)
        begin_session(patched, SHAPE, _request("hybrid"))
        with_lora = patched.model.apply_model(**_inputs(unet)).cpu()
        end_session(patched)
    assert torch.allclose(first, _whole(), atol=ATOL)
    assert torch.allclose(with_lora, _whole(lora=True), atol=ATOL)


# a step alone


def _auto(unet: UnetPatcher) -> Any:
    session = begin_session(unet, SHAPE, _request("auto"))
    assert session is not None
    return session


@pytest.mark.parametrize(("alone_ms", "strategy"), [(10.4, "single"), (20.0, "replicas")])
def test_dividing_that_was_seen_not_to_pay_is_not_done_again(two_gpus: Fleet, alone_ms: float, strategy: str) -> None:
    unet = _unet(two_gpus)
    session = _auto(unet)
    end_session(unet)
    two_gpus.trials[session.planning.trial.key] = Trial(divided_ms=10.0, alone_ms=alone_ms)
    session = _auto(unet)
    assert session.plan.strategy == strategy
    assert ("a step took 10 ms there" in session.plan.reason) == (strategy == "single")
    end_session(unet)


def test_the_third_step_is_done_alone_and_the_measured_better_is_kept(two_gpus: Fleet) -> None:
    unet = _unet(two_gpus)
    session = _auto(unet)
    results = [unet.model.apply_model(**_inputs(unet)) for _ in range(5)]
    trial = two_gpus.trials[session.planning.trial.key]
    assert trial.alone_ms > 0
    assert trial.divided_ms > 0
    assert session.plan.strategy == ("replicas" if trial.speedup >= LEAST_GAIN else "single")
    end_session(unet)
    assert all(torch.allclose(result, results[0], atol=ATOL) for result in results)


def test_a_trial_without_room_leaves_the_plan_as_it_is(two_gpus: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = _unet(two_gpus)
    session = _auto(unet)

    def no_room(call: object) -> Tensor:
        raise torch.OutOfMemoryError("no room for all rows")

    monkeypatch.setattr(unet.model, "run_here", no_room)
    results = [unet.model.apply_model(**_inputs(unet)) for _ in range(5)]
    assert session.plan.strategy == "replicas"
    assert all(torch.equal(result, results[0]) for result in results)
    end_session(unet)


# failure


@pytest.mark.parametrize("strategy", ["replicas", "layers"])
@pytest.mark.parametrize("slot", [0, 1])
def test_a_step_that_runs_out_of_memory_once_is_done_again(two_gpus: Fleet, strategy: str, slot: int, caplog: pytest.LogCaptureFixture) -> None:
    unet = _unet(two_gpus)
    begin_session(unet, SHAPE, _request(strategy))
    virtual_gpu.get_device(slot).set_faults(Faults(out_of_memory_at=frozenset({30})))
    result = unet.model.apply_model(**_inputs(unet))
    end_session(unet)
    assert torch.allclose(result.cpu(), _whole(), atol=ATOL)
    assert f"Out of memory on slot {slot}" in caplog.text


@pytest.mark.parametrize("strategy", ["replicas", "layers"])
def test_a_slot_that_keeps_running_out_of_memory_gets_less_and_then_nothing(two_gpus: Fleet, strategy: str) -> None:
    unet = _unet(two_gpus)
    session = begin_session(unet, SHAPE, _request(strategy))
    assert session is not None
    result = unet.model.apply_model(**_inputs(unet))
    used = set(session.plan.used_slots)
    virtual_gpu.get_device(1).set_faults(Faults(out_of_memory_share=1.0))
    again = unet.model.apply_model(**_inputs(unet))
    end_session(unet)
    assert used == {0, 1}
    assert set(session.plan.used_slots) == {0}
    assert torch.allclose(again, result, atol=ATOL)


def test_replicas_continue_without_a_lost_slot_and_so_do_later_runs(two_gpus: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    unet = _unet(two_gpus)
    begin_session(unet, SHAPE, _request("replicas"))
    virtual_gpu.get_device(1).set_faults(Faults(lost_at_operation=40))
    result = unet.model.apply_model(**_inputs(unet))
    end_session(unet)
    assert torch.allclose(result.cpu(), _whole(), atol=ATOL)
    assert "is lost" in caplog.text
    assert [slot.index for slot in two_gpus.working_slots] == [0]
    assert begin_session(unet, SHAPE, _request("auto")) is None, "one slot is left"


def test_layers_on_a_lost_slot_end_with_its_name(two_gpus: Fleet) -> None:
    unet = _unet(two_gpus)
    begin_session(unet, SHAPE, _request("layers"))
    virtual_gpu.get_device(1).set_faults(Faults(lost_at_operation=40))
    with pytest.raises(SlotLost, match="slot 1"):
        unet.model.apply_model(**_inputs(unet))
    end_session(unet)
    assert memory_management.lost_devices() == {two_gpus.device(1)}


def test_an_error_of_a_hook_ends_the_run_and_the_next_is_well(two_gpus: Fleet) -> None:
    def fail(h: Tensor, when: str, options: dict[str, Any]) -> Tensor:
        raise ValueError("a hook's own mistake")

    unet = _unet(two_gpus)
    begin_session(unet, SHAPE, _request("layers"))
    with pytest.raises(SlotFailure, match="a hook's own mistake"):
        unet.model.apply_model(**_inputs(unet), transformer_options={"block_modifiers": [fail]})
    assert torch.allclose(unet.model.apply_model(**_inputs(unet)).cpu(), _whole(), atol=ATOL)
    end_session(unet)


def test_a_cancelled_run_ends_at_once(two_gpus: Fleet) -> None:
    unet = _unet(two_gpus)
    begin_session(unet, SHAPE, _request("layers", is_cancelled=lambda: True))
    with pytest.raises(Cancelled):
        unet.model.apply_model(**_inputs(unet))
    end_session(unet)


# facts


def test_one_slot_needs_no_session() -> None:
    with configured_slots("cpu"):
        assert begin_session(_unet(), SHAPE, _request("auto")) is None


def test_a_hook_with_tensors_keeps_the_network_on_their_device(two_gpus: Fleet) -> None:
    unet = _unet(two_gpus)
    own = torch.ones(1, device=two_gpus.primary.torch_device)

    def add(h: Tensor, when: str, options: dict[str, Any]) -> Tensor:
        return h + own

    unet.add_block_modifier(add)
    session = begin_session(unet, SHAPE, _request("auto"))
    assert session is not None
    assert set(session.plan.used_slots) == {0}
    end_session(unet)
    assert "add" in str(find_bound_hook(unet.model_options["transformer_options"]))


def test_a_hook_without_tensors_binds_nothing() -> None:
    def double(h: Tensor, when: str, options: dict[str, Any]) -> Tensor:
        return h * 2

    assert (
        find_bound_hook({"block_modifiers": [double], "patches": {"attn1_patch": [double]}, "patches_replace": {"attn2": {("input", 1): double}}})
        is None
    )
