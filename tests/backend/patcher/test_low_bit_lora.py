"""LoRA over packed weights: a side branch where it is low-rank, merged or added while the layer runs where it is not. Reference: the dequantized
weight with the change merged in fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.patcher.base import ModelPatcher
from backend.patcher.lora_math import DiffPatch, LohaPatch, LoraPatch
from backend.patcher.weight_patches import WeightPatch
from backend.storage.choices import format_for, quantize_as
from backend.storage.kinds import storage_of
from backend.storage.packed import PackedTensor
from backend.storage.running import set_types

CPU = torch.device("cpu")
SIDE = 256


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def network(kind: str) -> nn.Sequential:
    """A linear layer and a convolution, both packed where the format can be written, else the linear layer with random blocks."""
    module = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Unflatten(1, (4, 8, 8)), nn.Conv2d(4, 4, 3, padding=1)).requires_grad_(False)
    if kind == "q4_k":
        form = format_for(kind, (SIDE, SIDE))
        assert form is not None
        buffer = torch.randint(256, (form.num_bytes,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8).reshape(-1, 144)
        buffer[:, :4] = torch.full((1, 2), 0.001, dtype=torch.float16).view(torch.uint8)
        packed: Tensor = PackedTensor(buffer.flatten(), form)
    else:
        found = quantize_as(kind, numbers(SIDE, SIDE, seed=1))
        assert found is not None
        packed = found
    module[0].weight = nn.Parameter(packed, requires_grad=False)
    set_types(module, torch.float32, torch.float32)
    return module


def plain(module: nn.Sequential) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Unflatten(1, (4, 8, 8)), nn.Conv2d(4, 4, 3, padding=1)).requires_grad_(False)
    made.load_state_dict({key: storage_of(tensor).dequantize(torch.float32) for key, tensor in module.state_dict().items()})
    return made


def lora(seed: int) -> WeightPatch:
    return LoraPatch(up=numbers(SIDE, 4, seed=seed), down=numbers(4, SIDE, seed=seed + 1), alpha=2.0)


def loha() -> WeightPatch:
    tall, wide = (SIDE, 2), (2, SIDE)
    return LohaPatch(w1_a=numbers(*tall, seed=1), w1_b=numbers(*wide, seed=2), w2_a=numbers(*tall, seed=3), w2_b=numbers(*wide, seed=4))


def patched(module: nn.Module, patches: dict[str, WeightPatch], strength: float, **how: Any) -> ModelPatcher:
    patcher = ModelPatcher(module, CPU, CPU)
    patcher.add_patches(filename="a", patches=patches, strength_patch=strength, **how)
    patcher.refresh_loras()
    return patcher


@pytest.mark.parametrize("kind", ["fp8_scaled", "nf4", "q8_0", "q4_k"])
def test_a_low_rank_change_runs_beside_the_layer(kind: str) -> None:
    module = network(kind)
    reference, stored, before = plain(module), module[0].weight, module[0].weight.buffer.clone()
    x = numbers(3, SIDE, seed=9)
    unchanged = module(x)
    for strength in (0.8, -1.5):  # another strength rewrites nothing
        patches = {"0.weight": lora(3)}
        patcher = patched(module, patches, strength)
        expected = patched(copy.deepcopy(reference), patches, strength).model(x)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(module(x), unchanged, atol=1e-3)
        assert module[0].weight is stored and torch.equal(stored.buffer, before)
        assert patcher.lora_loader.backup == {}
    patcher.lora_patches = {}
    patcher.refresh_loras()
    assert torch.equal(module(x), unchanged)


def test_several_changes_are_stacked_and_a_convolution_has_a_branch_too() -> None:
    module = network("q8_0")
    kernel = LoraPatch(up=numbers(4, 2, 1, 1, seed=5), down=numbers(2, 4, 3, 3, seed=6))
    patcher, reference = ModelPatcher(module, CPU, CPU), ModelPatcher(plain(module), CPU, CPU)
    for one in (patcher, reference):
        online = one is patcher
        one.add_patches(filename="a", patches={"0.weight": lora(3), "2.weight": kernel}, strength_patch=0.5, online_mode=online)
        one.add_patches(filename="b", patches={"0.weight": lora(11)}, strength_patch=2.0, online_mode=online)
        one.refresh_loras()
    x = numbers(3, SIDE, seed=9)
    torch.testing.assert_close(module(x), reference.model(x), rtol=1e-5, atol=1e-5)
    assert len(module[0]._forward_hooks) == len(module[2]._forward_hooks) == 2, "a branch next to the hook that dequantizes, however many changes"


@pytest.mark.parametrize("kind", ["fp8_scaled", "int8", "nf4", "q8_0", "q4_0"])
def test_other_changes_are_merged_and_the_bytes_come_back(kind: str) -> None:
    module = network(kind)
    before, x = module[0].weight.buffer.clone(), numbers(3, SIDE, seed=9)
    reference, unchanged = plain(module), module(x)
    patches: dict[str, WeightPatch] = {"0.weight": DiffPatch(diff=numbers(SIDE, SIDE, seed=4))}
    patcher = patched(module, patches, 1.0)
    merged = storage_of(module[0].weight).dequantize(torch.float32)
    patched(reference, patches, 1.0)
    rounding = torch.linalg.vector_norm(merged - reference[0].weight) / torch.linalg.vector_norm(reference[0].weight)
    assert 0 < rounding < {"fp8_scaled": 0.05, "int8": 0.02, "nf4": 0.12, "q8_0": 0.02, "q4_0": 0.12}[kind]
    patcher.lora_patches = {}
    patcher.refresh_loras()
    assert torch.equal(module[0].weight.buffer, before) and torch.equal(module(x), unchanged)


@pytest.mark.parametrize(("kind", "online"), [("q4_k", False), ("nf4", True)])
def test_other_changes_are_added_while_the_layer_runs_if_they_cannot_be_merged_or_should_not(kind: str, online: bool) -> None:
    module = network(kind)
    before, x = module[0].weight.buffer.clone(), numbers(3, SIDE, seed=9)
    reference = plain(module)
    patches = {"0.weight": loha()}
    patched(module, patches, 1.0, online_mode=online)
    patched(reference, patches, 1.0)
    torch.testing.assert_close(module(x), reference(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(module[0].weight.buffer, before)


def test_a_packed_table_is_changed_while_it_is_looked_up() -> None:
    table = nn.Embedding(50, 64).requires_grad_(False)
    packed = quantize_as("q8_0", numbers(50, 64, seed=1))
    assert packed is not None
    table.weight = nn.Parameter(packed, requires_grad=False)
    module = nn.Sequential(table)
    set_types(module, torch.float32, torch.float32)
    diff, tokens = numbers(50, 64, seed=2), torch.tensor([[3, 7, 49]])
    expected = (storage_of(packed).dequantize(torch.float32) + diff)[tokens]
    patched(module, {"0.weight": DiffPatch(diff=diff)}, 1.0, online_mode=True)
    torch.testing.assert_close(module(tokens), expected)
