"""Weight patches are applied and removed exactly, on any device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from backend.devices import virtual_gpu
from backend.memory.module_bytes import move_module
from backend.memory.streaming import start_streaming, stop_streaming
from backend.patcher.base import ModelPatcher
from backend.patcher.lora_math import DiffPatch, LoraPatch, extra_weight_calculators
from backend.patcher.weight_patches import Step, WeightPatchError, merge_recipe, unpatched_tensors, without_weight_patches
from backend.storage.running import set_types

CPU = torch.device("cpu")
MIB = 2**20


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Conv2d(4, 4, 3), nn.Linear(16, 8)).to(dtype).requires_grad_(False)


def patcher(model: nn.Module, device: torch.device = CPU) -> ModelPatcher:
    return ModelPatcher(model, load_device=device, offload_device=CPU)


def lora(out: int, inputs: int, seed: int, alpha: float | None = None) -> LoraPatch:
    generator = torch.Generator().manual_seed(seed)
    return LoraPatch(up=torch.randn(out, 2, generator=generator), down=torch.randn(2, inputs, generator=generator), alpha=alpha)


def patches(seed: int = 1) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "0.weight": lora(16, 8, seed),
        "1.weight": DiffPatch(diff=torch.randn(4, 4, 3, 3, generator=generator)),
        "2.bias": DiffPatch(diff=torch.randn(8, generator=generator)),
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to("cpu").clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_patch_is_added_and_leaves_without_a_trace(dtype: torch.dtype) -> None:
    model = network(dtype)
    before, one = weights(model), patcher(model)
    used = one.add_patches(filename="a", patches={**patches(), "9.weight": lora(2, 2, 0)}, strength_patch=0.5)
    assert used == {"0.weight", "1.weight", "2.bias"}
    assert_same(weights(model), before)  # nothing changes before it is requested

    one.refresh_loras()
    up, down = patches()["0.weight"].up, patches()["0.weight"].down  # type: ignore[attr-defined]
    expected = (before["0.weight"].double() + 0.5 * up.double() @ down.double()).to(dtype)
    torch.testing.assert_close(model[0].weight, expected)
    assert torch.equal(model[0].bias, before["0.bias"])
    assert one.lora_loader.backup.keys() == {"0.weight", "1.weight", "2.bias"}

    patcher(model).refresh_loras()  # another user of the network, without patches
    assert_same(weights(model), before)
    assert one.lora_loader.backup == {}


def test_a_changed_strength_starts_from_the_original_and_touches_only_what_changed() -> None:
    model, fresh = network(torch.float16), network(torch.float16)
    for strength in (1.0, 0.3, -0.7, 0.3):
        one = patcher(model)
        one.add_patches(filename="a", patches={"0.weight": lora(16, 8, 1)}, strength_patch=strength)
        one.add_patches(filename="b", patches={"2.bias": patches()["2.bias"]})
        one.refresh_loras()
    other = patcher(fresh)
    other.add_patches(filename="a", patches={"0.weight": lora(16, 8, 1)}, strength_patch=0.3)
    other.add_patches(filename="b", patches={"2.bias": patches()["2.bias"]})
    other.refresh_loras()
    assert_same(weights(model), weights(fresh))

    model[2].bias.zero_()  # would be overwritten if it were merged again
    kept = one.lora_patches
    one.lora_patches = {}
    one.add_patches(filename="a", patches={"0.weight": lora(16, 8, 1)}, strength_patch=0.9)
    one.lora_patches |= {key: value for key, value in kept.items() if key[0] == "b"}
    one.refresh_loras()
    assert not model[2].bias.any()


def test_patches_of_several_files_add_up_and_a_file_may_be_named_twice() -> None:
    model = network()
    before, one = weights(model), patcher(model)
    diff = torch.ones(8)
    one.add_patches(filename="a", patches={"2.bias": DiffPatch(diff=diff)})
    one.add_patches(filename="a", patches={"2.bias": DiffPatch(diff=diff)})
    one.add_patches(filename="b", patches={"2.bias": DiffPatch(diff=diff)}, strength_patch=2.0, strength_model=0.5)
    one.refresh_loras()
    torch.testing.assert_close(model[2].bias, (before["2.bias"] + 2) * 0.5 + 2)


def test_clones_have_separate_patches() -> None:
    model = network()
    before, one = weights(model), patcher(model)
    clone = one.clone()
    clone.add_patches(filename="a", patches=patches())
    assert one.lora_patches == {} and clone.clone().lora_patches == clone.lora_patches
    clone.refresh_loras()
    assert clone.lora_loader is one.lora_loader
    one.refresh_loras()
    assert_same(weights(model), before)


def test_parts_of_a_weight_and_functions_and_tuples_of_extensions() -> None:
    model = network()
    before, one = weights(model), patcher(model)
    one.add_patches(
        filename="a",
        patches={
            ("0.weight", (0, 4, 8)): ("diff", (torch.ones(8, 8),)),
            ("2.bias", None, lambda added: added * 3): ("diff", (torch.ones(8),)),
            "1.weight": ("set", (torch.zeros(4, 4, 3, 3),)),
            "2.weight": ("lora", (torch.ones(8, 2), torch.ones(2, 16), 1.0, None, None)),
        },
    )
    one.refresh_loras()
    assert torch.equal(model[0].weight[:4], before["0.weight"][:4]) and torch.equal(model[0].weight[12:], before["0.weight"][12:])
    torch.testing.assert_close(model[0].weight[4:12], before["0.weight"][4:12] + 1)
    torch.testing.assert_close(model[2].bias, before["2.bias"] + 3)
    assert not model[1].weight.any()
    torch.testing.assert_close(model[2].weight, before["2.weight"] + 1)


def test_an_extension_adds_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extra_weight_calculators, "twice", lambda weight, strength, values: weight * 2 * strength + values[0])
    model = network()
    before, one = weights(model), patcher(model)
    one.add_patches(filename="a", patches={"2.bias": ("twice", (1.0,))}, strength_patch=0.5)
    one.refresh_loras()
    torch.testing.assert_close(model[2].bias, before["2.bias"] + 1)
    with pytest.raises(WeightPatchError, match="'thrice'"):
        one.add_patches(filename="a", patches={"2.bias": ("thrice", (1.0,))})


def test_a_patch_of_another_shape_is_refused_and_nothing_is_added() -> None:
    one = patcher(network())
    with pytest.raises(WeightPatchError, match=r"0\.weight is \(16, 8\)"):
        one.add_patches(filename="wide", patches={"2.bias": patches()["2.bias"], "0.weight": lora(16, 9, 1)})
    assert one.lora_patches == {}


def test_a_merge_that_fails_leaves_the_network_as_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before, one = weights(model), patcher(model)
    one.add_patches(filename="good", patches=patches())
    one.refresh_loras()

    def fail(weight: Tensor, strength: float, values: object) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(extra_weight_calculators, "fail", fail)
    one.add_patches(filename="bad", patches={"2.weight": ("fail", ())})
    with pytest.raises(torch.OutOfMemoryError):
        one.refresh_loras()
    assert_same(weights(model), before)
    assert one.lora_loader.backup == {}


# devices


@pytest.fixture
def devices() -> tuple[torch.device, ...]:
    return virtual_gpu.install([64 * MIB, 64 * MIB])


def test_each_weight_is_patched_on_its_device(devices: tuple[torch.device, ...]) -> None:
    model, plain = network(), network()
    before = weights(model)
    move_module(model, devices[0])
    move_module(model[2], devices[1])  # a stage on another slot; the convolution stays with the first
    one, other = patcher(model, devices[0]), patcher(plain)
    for each in (one, other):
        each.add_patches(filename="a", patches=patches())
        each.refresh_loras()
    assert_same(weights(model), weights(plain))
    assert (model[0].weight.device, model[2].bias.device) == devices
    assert {tensor.device for tensor in one.lora_loader.backup.values()} == {CPU}

    move_module(model[0], devices[1])  # stages may move while patches are applied
    one.lora_patches = {}
    one.refresh_loras()
    assert_same(weights(model), before)


def test_a_replica_module_gets_the_same_weights(devices: tuple[torch.device, ...]) -> None:
    model = network(torch.float16)
    before, one = weights(model), patcher(model, devices[0])
    move_module(model, devices[0])
    one.add_patches(filename="a", patches=patches())
    one.refresh_loras()

    replica = patcher(copy.deepcopy(model), devices[1])
    assert replica.lora_loader is not one.lora_loader
    move_module(replica.model, devices[1])
    replica.copy_patches_from(one)
    replica.refresh_loras()
    assert_same(weights(replica.model), weights(model))

    one.lora_patches = {}
    one.refresh_loras()
    assert not torch.equal(replica.model[0].weight.to("cpu"), model[0].weight.to("cpu"))  # each has its state
    replica.copy_patches_from(one)
    replica.refresh_loras()
    assert_same(weights(replica.model), before)


def test_a_network_built_from_the_originals_becomes_a_replica(devices: tuple[torch.device, ...]) -> None:
    model = network(torch.float16)
    before, one = weights(model), patcher(model, devices[0])
    assert_same(dict(unpatched_tensors(model)), before)
    move_module(model, devices[0])
    one.add_patches(filename="a", patches=patches())
    one.refresh_loras()
    assert_same({name: tensor.to("cpu") for name, tensor in unpatched_tensors(model).items()}, before)

    built = network(torch.float16, seed=5)
    built.load_state_dict({name: tensor.to("cpu") for name, tensor in unpatched_tensors(model).items()})
    replica = patcher(built)
    replica.copy_patches_from(one)
    replica.refresh_loras()
    assert_same(weights(built), weights(model))
    assert all(replica.lora_loader.backup[name] is original for name, original in one.lora_loader.backup.items())  # kept once on the host


def test_networks_of_other_weights_share_no_originals() -> None:
    model, other = network(), network(seed=5)
    before, one, two = weights(other), patcher(model), patcher(other)
    one.add_patches(filename="a", patches=patches())
    one.refresh_loras()
    two.copy_patches_from(one)
    two.refresh_loras()
    two.lora_patches = {}
    two.refresh_loras()
    assert_same(weights(other), before)


@pytest.mark.parametrize("online", [False, True])
def test_streamed_layers_compute_with_patched_weights(devices: tuple[torch.device, ...], online: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).requires_grad_(False)
    before = weights(model)
    some = {"0.weight": lora(16, 8, 1), "1.bias": patches()["2.bias"]}
    reference = patcher(copy.deepcopy(model))
    reference.add_patches(filename="a", patches=some)
    reference.refresh_loras()

    streamed = start_streaming(model, devices[0], 0)
    one = patcher(model, devices[0])
    one.add_patches(filename="a", patches=some, online_mode=online)
    one.refresh_loras()
    x = torch.randn(3, 8)
    for _ in range(2):
        torch.testing.assert_close(model(x.to(devices[0])).to("cpu"), reference.model(x), rtol=1e-5 if online else 0, atol=1e-6 if online else 0)
    assert model[0].weight.device == CPU
    if not online:
        assert_same(weights(model), weights(reference.model))
    one.lora_patches = {}
    one.refresh_loras()
    stop_streaming(streamed)
    assert_same(weights(model), before)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


# fp8 storage


@pytest.mark.parametrize("online", [False, True])
def test_fp8_storage_that_is_dequantized_layer_by_layer(online: bool) -> None:
    model = network()
    change = {"0.weight": DiffPatch(diff=torch.full((16, 8), 0.003))}
    exact = patcher(copy.deepcopy(model))
    model.to(torch.float8_e4m3fn)
    exact.model.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    before = weights(model)
    set_types(model[:1], torch.float8_e4m3fn, torch.float32)
    one = patcher(model)
    one.add_patches(filename="a", patches=change, online_mode=online)
    exact.add_patches(filename="a", patches=change)
    assert one.has_online_lora() is online
    x = torch.ones(1, 8)
    plain = exact.model[0](x)
    for each in (one, exact):
        each.refresh_loras()
    got, wanted = model[0](x), exact.model[0](x)
    if online:
        torch.testing.assert_close(got, wanted)
        assert torch.equal(weights(model)["0.weight"].float(), before["0.weight"].float())
    else:  # single weights differ by up to one step, their mean does not
        assert not torch.equal(got, plain)
        assert abs((model[0].weight.float() - exact.model[0].weight).mean().item()) < 0.002
    one.lora_patches = {}
    one.refresh_loras()
    assert torch.equal(model[0](x), plain)
    assert torch.equal(weights(model)["0.weight"].float(), before["0.weight"].float())


def test_an_online_patch_leaves_when_its_layer_fails() -> None:
    model = network()
    before, one = weights(model), patcher(model)
    one.add_patches(filename="a", patches={"0.weight": lora(16, 8, 1)}, online_mode=True)
    one.refresh_loras()
    with pytest.raises(RuntimeError):
        model[0](torch.ones(1, 7))
    assert_same(weights(model), before)


def test_saving_sees_the_network_as_it_was_made() -> None:
    model = network()
    before, one = weights(model), patcher(model)
    one.add_patches(filename="a", patches=patches())
    one.refresh_loras()
    patched = weights(model)
    with without_weight_patches(model):
        assert_same(weights(model), before)
    assert_same(weights(model), patched)


def test_a_recipe_is_followed_in_order() -> None:
    steps = (Step(1.0, DiffPatch(diff=torch.tensor([1.0]))), Step(2.0, DiffPatch(diff=torch.tensor([1.0])), 10.0))
    assert merge_recipe(torch.tensor([5.0]), steps).item() == 62.0
