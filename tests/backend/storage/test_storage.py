"""The storage protocol: every method of every kind. References: torch's casts and matrix products."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from backend.memory.module_bytes import count_module_bytes
from backend.storage.base import Storage
from backend.storage.fp8 import Fp8Storage, round_at_random
from backend.storage.kinds import is_compact, storage_of, stored_bytes
from backend.storage.plain import PlainStorage
from backend.storage.running import computing_in, is_cast_layer, set_types

CPU = torch.device("cpu")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def storage(dtype: torch.dtype, *shape: int, seed: int = 0) -> Storage:
    return storage_of(numbers(*(shape or (6, 4)), seed=seed).to(dtype))


@pytest.mark.parametrize("dtype", [*PLAIN, *FP8])
def test_every_kind_answers_every_question(dtype: torch.dtype) -> None:
    weight = storage(dtype)
    assert type(weight) is (Fp8Storage if dtype in FP8 else PlainStorage)
    assert (weight.shape, weight.device, weight.stored_bytes) == ((6, 4), CPU, 24 * dtype.itemsize)
    assert is_compact(dtype) is (dtype in FP8)
    values = weight.dequantize(torch.float32)
    assert values.dtype == torch.float32 and torch.equal(values, weight.tensor.float())
    assert torch.equal(weight.rows(2, 5).dequantize(torch.float32), values[2:5])
    assert torch.equal(weight.look_up(torch.tensor([3, 0]), torch.float32), values[[3, 0]])
    joined = type(weight).concat([weight.rows(0, 2), weight.rows(2, 6)])
    assert joined.is_same(weight) and not joined.is_same(weight.rows(0, 6).to(CPU).rows(0, 3))
    assert not weight.is_same(storage(dtype, seed=1))
    moved = weight.to(CPU, copy=True)
    assert moved.is_same(weight) and moved.tensor.data_ptr() != weight.tensor.data_ptr()
    assert weight.to_host().tensor.data_ptr() != weight.tensor.data_ptr()
    assert weight.run_dtype(torch.float16) == (torch.float16 if dtype in FP8 else dtype)
    assert weight.computes_in(dtype) and not weight.computes_in(torch.float64)


@pytest.mark.parametrize("dtype", [*PLAIN, *FP8])
def test_dequantize_with_copy_is_never_the_weight_itself(dtype: torch.dtype) -> None:
    weight = storage(dtype)
    before = weight.tensor.clone()
    weight.dequantize(torch.float32, copy=True).zero_()
    assert weight.is_same(storage_of(before))


@pytest.mark.parametrize("dtype", [*PLAIN, *FP8])
def test_requantize_keeps_what_is_exact_and_the_memory_it_writes_to(dtype: torch.dtype) -> None:
    weight, other = storage(dtype), storage(dtype, seed=1)
    assert weight.requantize(other.dequantize(torch.float32), seed=1).is_same(other)
    address = weight.tensor.data_ptr()
    weight.overwrite(other.dequantize(torch.float32), seed=1)
    assert weight.is_same(other) and weight.tensor.data_ptr() == address
    value = numbers(6, 4, seed=2)
    assert weight.requantize(value, seed=5).is_same(weight.requantize(value, seed=5))


def test_bytes_count_what_is_stored() -> None:
    layer = nn.Linear(8, 4).to(torch.float8_e4m3fn)
    assert stored_bytes(layer.parameters()) == 8 * 4 + 4 == count_module_bytes(layer).total_bytes


def test_fp8_rounding_keeps_the_mean_and_what_is_exact() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        stored = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(round_at_random(stored.float(), dtype, seed=1).float(), stored.float())
        between = torch.full((200, 200), 1.03)
        rounded = round_at_random(between, dtype, seed=1).float()
        assert rounded.unique().numel() == 2 and abs(rounded.mean().item() - 1.03) < 0.005
        assert torch.equal(rounded, round_at_random(between, dtype, seed=1).float())
        tiny = torch.tensor([0.0, 1e-9, 1e9, -1e9])
        assert torch.equal(round_at_random(tiny, dtype, seed=3).float()[2:], torch.tensor([1.0, -1.0]) * torch.finfo(dtype).max)


# layers that dequantize at run time


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(1, 2, 1)).requires_grad_(False)


def test_cast_layers_are_stored_compactly_and_compute_in_the_other_type() -> None:
    module = network()
    set_types(module, torch.float8_e4m3fn, torch.float32)
    assert (module[0].weight.dtype, module[1].weight.dtype, module[2].weight.dtype) == (torch.float8_e4m3fn, torch.float32, torch.float8_e4m3fn)
    x = numbers(2, 8)
    expected = nn.functional.linear(x, module[0].weight.float(), module[0].bias.float())
    stored = module[0].weight
    assert torch.equal(module[0](x), expected)
    assert module[0].weight is stored


def test_the_stored_weight_is_restored_when_the_layer_raises() -> None:
    module = network()
    set_types(module, torch.float8_e4m3fn, torch.float32)
    stored = module[0].weight
    with pytest.raises(RuntimeError):
        module[0](numbers(2, 3))
    assert module[0].weight is stored


def test_a_deep_copy_dequantizes_its_own_weights() -> None:
    module = network()
    set_types(module, torch.float8_e4m3fn, torch.float32)
    copied = copy.deepcopy(module)
    copied[0].weight.data = torch.zeros(8, 8).to(torch.float8_e4m3fn)
    x = numbers(2, 8)
    assert torch.equal(copied[0](x), copied[0].bias.float().expand(2, -1))
    assert not torch.equal(module[0](x), copied[0](x))
    assert copied[0].weight.dtype == module[0].weight.dtype == torch.float8_e4m3fn


def test_computing_in_applies_only_to_the_block() -> None:
    module = network()[:1].to(torch.float16)
    x = numbers(2, 8)
    with computing_in(module, torch.float32):
        assert module(x).dtype == torch.float32
    assert module(x.half()).dtype == torch.float16
    assert not module[0]._forward_hooks and not module[0]._forward_pre_hooks


def test_norms_are_never_stored_compactly_but_what_makes_their_scales_is() -> None:
    """A third of a Flux transformer's weights are linear layers of adaptive norms."""
    network = nn.ModuleDict({"norm_out": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    set_types(network, torch.float8_e4m3fn, torch.float32)
    assert (network["norm_out"].weight.dtype, network["norm"].weight.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert is_cast_layer(nn.Embedding(2, 2)) and not is_cast_layer(nn.LayerNorm(2))
