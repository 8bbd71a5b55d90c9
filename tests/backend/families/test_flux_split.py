"""A Flux.1 transformer over several slots, and what happens when one fails. Reference: the same rows one by one on one slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend import memory_management
from backend.devices import virtual_gpu
from backend.devices.virtual_gpu import Faults
from backend.families.flux.key_map import flux_key_map
from backend.families.flux.program import build_flux_program
from backend.memory.module_bytes import count_module_bytes
from backend.modules.k_model import KModel, split_unet_across_gpus
from backend.modules.k_prediction import FlowPrediction
from backend.parallel.placing.fleet import Fleet
from backend.parallel.planning.plan import Piece, ReplicaPlan
from backend.parallel.running.session import SamplingRequest, begin_session, end_session
from backend.patcher.lora_files import match_lora, parse_lora
from backend.patcher.unet import UnetPatcher
from backend.storage.choices import quantize_as
from backend.storage.kinds import has_packed_weights
from tests.support.fleets import virtual_fleet
from tests.support.flux_networks import CONFIG, make_flux, original_tensors

SHAPE = (2, 16, 8, 8)
ATOL = 2e-5
LORA_BYTES = 400_000
"""Of the rank-2 changes of every matrix, stacked."""


LOW_BITS = ("fp8_scaled", "int8", "int8_convrot", "mxfp8", "nvfp4", "nf4", "fp4", "q8_0", "q4_1")
WIDE = {"num_attention_heads": 4}
"""Rows that blocks of 32 divide."""


def make_patcher(
    fleet: Fleet | None = None,
    lora: bool = False,
    dtype: torch.dtype = torch.float32,
    packed: str | None = None,
    compute: torch.dtype = torch.float32,
    **changes: Any,
) -> UnetPatcher:
    """`changes`: to the tiny network's configuration."""
    flux = make_flux(**{**(WIDE if packed else {}), **changes})
    original = original_tensors(flux)
    if packed is not None:
        for layer in flux.modules():
            if isinstance(layer, nn.Linear):
                found = quantize_as(packed, layer.weight)
                layer.weight = layer.weight if found is None else nn.Parameter(found, requires_grad=False)
    model = KModel(
        flux, FlowPrediction(multiplier=1.0), storage_dtype=dtype, computation_dtype=compute, build_program=build_flux_program,
        key_map=flux_key_map(flux),
    )  # fmt: skip
    cpu = torch.device("cpu")
    unet = UnetPatcher(model, cpu if fleet is None else fleet.primary.torch_device, cpu)
    if lora:
        generator = torch.Generator().manual_seed(8)
        file: dict[str, Tensor] = {}
        for key, tensor in original.items():
            if key.endswith(".weight") and tensor.ndim == 2:
                name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
                file[f"{name}.lora_up.weight"] = torch.randn(tensor.shape[0], 2, generator=generator) * 0.1
                file[f"{name}.lora_down.weight"] = torch.randn(2, tensor.shape[1], generator=generator) * 0.1
        patches = match_lora(parse_lora("test", file), unet, None, model_family="Flux.1")
        unet.add_patches(filename="test", patches=dict(patches.unet), strength_patch=0.8)
    return unet


def make_inputs(home: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "x": torch.randn(SHAPE, generator=generator),
        "t": torch.tensor([0.75, 0.75]),
        "c_crossattn": torch.randn(SHAPE[0], 9, CONFIG["joint_attention_dim"], generator=generator),
        "y": torch.randn(SHAPE[0], CONFIG["pooled_projection_dim"], generator=generator),
        "guidance": torch.tensor([3.5, 2.0]),
    }
    return {name: tensor.to(home) for name, tensor in inputs.items()}


def whole(lora: bool = False, dtype: torch.dtype = torch.float32, packed: str | None = None, **changes: Any) -> Tensor:
    unet = make_patcher(lora=lora, dtype=dtype, packed=packed, **changes)
    if lora:
        unet.refresh_loras()
    inputs = make_inputs(torch.device("cpu"))
    return torch.cat([unet.model.apply_model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}) for row in range(SHAPE[0])])


def request(strategy: Any) -> SamplingRequest:
    return SamplingRequest(images=SHAPE[0], branches=1, strategy=strategy)


@pytest.fixture(params=[2, 3, 4])
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with virtual_fleet(request.param) as fleet:
        yield fleet
        for device in range(request.param):
            virtual_gpu.get_device(device).set_faults(None)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
def test_layers_give_the_very_bits_of_one_slot(fleet: Fleet, lora: bool) -> None:
    unet = make_patcher(fleet, lora)
    session = begin_session(unet, SHAPE, request("layers"))
    assert session is not None and session.plan.strategy == "layers"
    assert len(session.plan.used_slots) >= min(3, len(fleet.working_slots)), "six pieces of unlike size may leave a fourth slot idle"
    for _ in range(3):  # the third job uses the cut made from measured times
        result = unet.model.apply_model(**make_inputs(unet.load_device))
        assert torch.equal(result.cpu(), whole(lora))
    end_session(unet)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
def test_replicas_give_what_one_slot_gives(fleet: Fleet, lora: bool) -> None:
    unet = make_patcher(fleet, lora)
    session = begin_session(unet, SHAPE, request("replicas"))
    assert session is not None and session.plan.strategy == "replicas"
    assert torch.allclose(unet.model.apply_model(**make_inputs(unet.load_device)).cpu(), whole(lora), atol=ATOL)
    end_session(unet)


@pytest.mark.parametrize("strategy", ["replicas", "layers"])
@pytest.mark.parametrize("slot", [0, 1])
def test_a_step_that_runs_out_of_memory_in_the_middle_is_done_again(strategy: str, slot: int, caplog: pytest.LogCaptureFixture) -> None:
    with virtual_fleet(2) as fleet:
        unet = make_patcher(fleet, lora=True)
        begin_session(unet, SHAPE, request(strategy))
        virtual_gpu.get_device(slot).set_faults(Faults(out_of_memory_at=frozenset({40})))
        result = unet.model.apply_model(**make_inputs(unet.load_device))
        end_session(unet)
        virtual_gpu.get_device(slot).set_faults(None)
    assert torch.allclose(result.cpu(), whole(lora=True), atol=ATOL)
    assert f"Out of memory on slot {slot}" in caplog.text


def test_weights_in_fp8_split_as_they_are() -> None:
    with virtual_fleet(2) as fleet:
        unet = make_patcher(fleet, dtype=torch.float8_e4m3fn)
        begin_session(unet, SHAPE, request("layers"))
        result = unet.model.apply_model(**make_inputs(unet.load_device))
        end_session(unet)
    assert torch.equal(result.cpu(), whole(dtype=torch.float8_e4m3fn))


@pytest.mark.parametrize("packed", LOW_BITS)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
def test_packed_weights_split_as_they_are(packed: str, lora: bool) -> None:
    """By layers to the very bits, and as replicas; slots hold packed bytes, with and without a side-branch LoRA."""
    expected = whole(lora, packed=packed)
    with virtual_fleet(2) as fleet:
        for strategy in ("layers", "replicas"):
            unet = make_patcher(fleet, lora, packed=packed)
            session = begin_session(unet, SHAPE, request(strategy))
            assert session is not None and session.plan.strategy == strategy
            result = unet.model.apply_model(**make_inputs(unet.load_device)).cpu()
            assert torch.allclose(result, expected, atol=ATOL)
            assert strategy == "replicas" or torch.equal(result, expected)
            copies = 2 if strategy == "replicas" else 1
            held = sum(virtual_gpu.get_device(slot).live_bytes for slot in (0, 1))
            assert held < copies * (count_module_bytes(unet.model).total_bytes + (LORA_BYTES if lora else 0)) + 100_000
            end_session(unet)
            memory_management.unload_all_models()


def test_packed_weights_compute_a_row_in_tiles() -> None:
    with virtual_fleet(2) as fleet:
        unet = make_patcher(fleet, packed="q8_0")
        session = begin_session(unet, SHAPE, SamplingRequest(images=1, branches=1, strategy="tiles"))
        assert session is not None and session.plan.strategy == "tiles"
        result = unet.model.apply_model(**{name: tensor[:1] for name, tensor in make_inputs(unet.load_device).items()})
        end_session(unet)
    assert torch.allclose(result.cpu(), whole(packed="q8_0")[:1], atol=ATOL)


@pytest.mark.parametrize("strategy", ["replicas", "layers"])
def test_a_step_of_packed_weights_that_runs_out_of_memory_is_done_again(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    with virtual_fleet(2) as fleet:
        unet = make_patcher(fleet, lora=True, packed="q8_0")
        begin_session(unet, SHAPE, request(strategy))
        held = sum(virtual_gpu.get_device(slot).live_bytes for slot in (0, 1))
        virtual_gpu.get_device(1).set_faults(Faults(out_of_memory_at=frozenset({60})))
        result = unet.model.apply_model(**make_inputs(unet.load_device))
        assert has_packed_weights(unet.model) and sum(virtual_gpu.get_device(slot).live_bytes for slot in (0, 1)) < held + LORA_BYTES + 100_000
        end_session(unet)
        virtual_gpu.get_device(1).set_faults(None)
    assert torch.allclose(result.cpu(), whole(lora=True, packed="q8_0"), atol=ATOL)
    assert "Out of memory on slot 1" in caplog.text


def test_layers_in_fp16_give_the_very_bits_of_one_slot() -> None:
    """Cards without bfloat16: matrices in fp16, streams in fp32 (test_flux_network.py), whole or cut."""
    half: dict[str, Any] = {"dtype": torch.float16, "compute": torch.float16}
    with virtual_fleet(2) as fleet:
        unet = make_patcher(fleet, **half)
        session = begin_session(unet, SHAPE, request("layers"))
        assert session is not None and session.plan.strategy == "layers"
        result = unet.model.apply_model(**make_inputs(unet.load_device)).cpu()
        end_session(unet)
    assert torch.equal(result, whole(**half)) and (result - whole()).abs().mean() < 0.02


CUTS = [*(tuple(int(number >= first) for number in range(6)) for first in range(1, 6)), (0, 1, 2, 3, 3, 0), (3, 3, 0, 1, 2, 2)]


@pytest.mark.parametrize("slots", CUTS)
def test_a_cut_at_any_place_gives_the_same(slots: tuple[int, ...]) -> None:
    """By hand, between every two neighbours among two double blocks, three single blocks and the way out; and over four slots."""
    with virtual_fleet(1 + max(slots)) as fleet:
        unet = make_patcher(fleet)
        plan = ReplicaPlan(pieces=tuple(Piece(number) for number in range(6)), slots=slots)
        with split_unet_across_gpus(unet, plan):
            inputs = make_inputs(fleet.device(0))
            rows = [unet.model.apply_model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}) for row in range(SHAPE[0])]
            result = torch.cat(rows).cpu()
    assert torch.equal(result, whole())
