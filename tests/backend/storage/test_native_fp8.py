"""Products of e4m3 weights as they are. Reference: the same product in fp32 with the input rounded to e4m3 token by token. Not run on a card here:
torch has the same function for the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.patcher.base import ModelPatcher
from backend.patcher.lora_math import DiffPatch, LoraPatch
from backend.storage.choices import quantize_as
from backend.storage.kinds import storage_of
from backend.storage.native_fp8 import Fp8Operand, operand_of
from backend.storage.running import set_types

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: str, *, native: bool, out_features: int = 48) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(64, out_features)).requires_grad_(False)
    module[0].bias.copy_(numbers(out_features, seed=3))
    value = numbers(out_features, 64, seed=1) * 0.05
    packed = value.to(torch.float8_e4m3fn) if kind == "plain" else quantize_as(kind, value)
    assert packed is not None
    module[0].weight = nn.Parameter(packed, requires_grad=False)
    set_types(module, torch.float8_e4m3fn if kind == "plain" else torch.float32, torch.float32, multiplies_fp8=native)
    return module


def rounded(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("kind", ["plain", "fp8_scaled"])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_the_product_is_that_of_the_rounded_input(kind: str, shape: tuple[int, ...]) -> None:
    native, plain = layer(kind, native=True), layer(kind, native=False)
    x = numbers(*shape, seed=2) * torch.logspace(-3, 3, shape[-2])[:, None]  # tokens of very different size
    stored = native[0].weight
    found, wanted = native(x), plain(rounded(x))
    assert found.dtype == torch.float32 and found.shape == wanted.shape and native[0].weight is stored
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)  # the product comes out in bfloat16
    assert not torch.equal(found, plain(x))


def test_a_token_does_not_depend_on_the_others() -> None:
    """So that rows may be dealt to slots."""
    module, x = layer("fp8_scaled", native=True), numbers(6, 64, seed=2)
    assert torch.equal(module(x)[2:4], module(x[2:4])) and torch.equal(module(torch.cat([x, 1000 * x]))[:6], module(x))


def test_what_has_no_such_product_is_dequantized() -> None:
    for kind, out_features in (("nf4", 48), ("int8", 48), ("fp8_scaled", 40)):
        module = layer(kind, native=True, out_features=out_features)
        x = numbers(2, 64, seed=2)
        assert operand_of(storage_of(module[0].weight)) is None
        assert torch.equal(module(x), layer(kind, native=False, out_features=out_features)(x))


def test_a_lora_runs_beside_the_product_and_other_changes_replace_it() -> None:
    x = numbers(3, 64, seed=2)
    for patch in (LoraPatch(up=numbers(48, 2, seed=5) * 0.1, down=numbers(2, 64, seed=6) * 0.1), DiffPatch(diff=numbers(48, 64, seed=7) * 0.1)):
        module = layer("fp8_scaled", native=True)
        unchanged, value = module(x), storage_of(module[0].weight).dequantize(torch.float32)
        patcher = ModelPatcher(module, CPU, CPU)
        patcher.add_patches(filename="a", patches={"0.weight": patch}, strength_patch=1.0, online_mode=True)
        patcher.refresh_loras()
        added = nn.functional.linear(x, patch.merge(value.clone(), 1.0) - value)
        low_rank = isinstance(patch, LoraPatch)
        base = unchanged if low_rank else layer("fp8_scaled", native=False)(x)
        torch.testing.assert_close(module(x), base + added, rtol=1e-4, atol=1e-4)


def test_the_operand_shares_the_stored_bytes() -> None:
    weight: Any = layer("fp8_scaled", native=True)[0].weight
    operand = operand_of(storage_of(weight))
    assert isinstance(operand, Fp8Operand) and operand.data_ptr() == weight.buffer.data_ptr() + 4
