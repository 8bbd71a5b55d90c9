"""Patchers: hooks belong to a clone, the network is shared, swaps have an exact inverse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.patcher.base import ModelPatcher
from backend.patcher.unet import UnetPatcher
from tests.support.checkpoints import build_models

CPU = torch.device("cpu")


def _patcher() -> ModelPatcher:
    return ModelPatcher(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), CPU, CPU)


@pytest.fixture(scope="module")
def unet() -> UnetPatcher:
    return UnetPatcher(KModel(build_models(Path("none"), "sd15").unet, Prediction()), CPU, CPU)


def test_sizes_are_those_of_the_weights() -> None:
    assert _patcher().model_size() == (2 * 3 + 3 + 3 + 1) * 4
    assert ModelPatcher(nn.Linear(2, 2), CPU, CPU, size=123).model_size() == 123


def test_clones_share_the_network_and_nothing_else(unet: UnetPatcher) -> None:
    def hook(*args: object) -> object:
        return args[0]

    unet.set_model_output_block_patch(hook)
    clone = unet.clone()
    assert isinstance(clone, UnetPatcher)
    assert clone.is_clone(unet)
    assert not clone.is_clone(_patcher())
    clone.set_model_output_block_patch(hook)
    clone.set_model_attn1_replace(hook, "middle", 0)
    clone.add_block_modifier(hook)
    clone.add_extra_preserved_memory_during_sampling(7)
    clone.extra_model_patchers_during_sampling.append(_patcher())
    options = unet.model_options["transformer_options"]
    assert options["patches"] == {"output_block_patch": [hook]}
    assert "patches_replace" not in options
    assert "block_modifiers" not in options
    assert (unet.extra_preserved_memory_during_sampling, unet.extra_model_patchers_during_sampling) == (0, [])
    assert clone.model_options["transformer_options"]["patches_replace"] == {"attn1": {("middle", 0): hook}}
    assert clone.model_options["transformer_options"]["patches"]["output_block_patch"] == [hook, hook], "hooks are not copied"


def test_every_setter_puts_its_hook_where_the_network_looks() -> None:
    patcher = _patcher()
    for name in ("attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch", "input_block_patch", "input_block_patch_after_skip"):
        getattr(patcher, f"set_model_{name}")("hook")
        assert patcher.model_options["transformer_options"]["patches"][name] == ["hook"]
    patcher.set_model_attn2_replace("hook", "input", 4, 1)
    assert patcher.model_options["transformer_options"]["patches_replace"] == {"attn2": {("input", 4, 1): "hook"}}
    patcher.set_model_unet_function_wrapper("wrapper")
    patcher.set_model_vae_encode_wrapper("encode")
    patcher.set_model_vae_decode_wrapper("decode")
    patcher.set_model_vae_regulation("regulation")
    patcher.set_model_denoise_mask_function("mask")
    expected = {"model_function_wrapper": "wrapper", "model_vae_encode_wrapper": "encode", "model_vae_decode_wrapper": "decode",
                "model_vae_regulation": "regulation", "denoise_mask_function": "mask"}  # fmt: skip
    assert {key: patcher.model_options[key] for key in expected} == expected


def test_cfg_setters() -> None:
    patcher = _patcher()
    patcher.set_model_sampler_cfg_function(lambda cond, uncond, scale: cond * scale - uncond)
    assert patcher.model_options["sampler_cfg_function"]({"cond": 3, "uncond": 1, "cond_scale": 2}) == 5, "the old form with three arguments"
    patcher.set_model_sampler_cfg_function(lambda args: args["cond"])
    assert patcher.model_options["sampler_cfg_function"]({"cond": 3}) == 3
    assert "disable_cfg1_optimization" not in patcher.model_options
    patcher.set_model_sampler_pre_cfg_function("before")
    patcher.set_model_sampler_post_cfg_function("after", disable_cfg1_optimization=True)
    patcher.set_model_sampler_post_cfg_function("again")
    assert patcher.model_options["sampler_pre_cfg_function"] == ["before"]
    assert patcher.model_options["sampler_post_cfg_function"] == ["after", "again"]
    assert patcher.model_options["disable_cfg1_optimization"] is True


def test_unet_options(unet: UnetPatcher) -> None:
    clone = unet.clone()
    clone.add_block_inner_modifier("inner")
    clone.add_block_inner_modifier("inner", ensure_uniqueness=True)
    clone.set_group_norm_wrapper("norm")
    clone.set_controlnet_model_function_wrapper("control")
    clone.add_controlnet_conditioning_modifier("hint")
    clone.add_alphas_cumprod_modifier("alphas")
    options = clone.model_options["transformer_options"]
    assert options["block_inner_modifiers"] == ["inner"]
    assert (options["group_norm_wrapper"], options["controlnet_model_function_wrapper"]) == ("norm", "control")
    assert options["controlnet_conditioning_modifiers"] == ["hint"]
    clone.set_model_replace_all("replace", "attn2")
    assert len(clone.model_options["transformer_options"]["patches_replace"]["attn2"]) == 3 * 16 * 16


def test_the_chain_of_controlnets_is_newest_first(unet: UnetPatcher) -> None:
    class Link:
        previous_controlnet = None

        def set_previous_controlnet(self, previous: object) -> None:
            self.previous_controlnet = previous

    clone, first, second = unet.clone(), Link(), Link()
    clone.add_patched_controlnet(first)
    clone.add_patched_controlnet(second)
    assert clone.list_controlnets() == [second, first]
    assert clone.clone().list_controlnets() == [second, first]
    assert unet.list_controlnets() == []


def test_extra_modules_take_the_type_the_unet_computes_in(unet: UnetPatcher) -> None:
    clone, module = unet.clone(), nn.Linear(2, 2).double()
    patcher = clone.add_extra_torch_module_during_sampling(module)
    assert module.weight.dtype == torch.float32
    assert clone.extra_model_patchers_during_sampling == [patcher]


def test_swapped_attributes_are_restored_exactly() -> None:
    patcher, other = _patcher(), _patcher()
    weight, layer = patcher.model[0].weight, patcher.model[1]
    patcher.add_object_patch("0.weight", nn.Parameter(torch.zeros(3, 2)))
    patcher.add_object_patch("1", nn.Identity())
    patcher.add_object_patch("training", "patched")
    assert patcher.get_model_object("training") == "patched"
    patcher.forge_patch_model()
    assert isinstance(patcher.model[1], nn.Identity)
    assert not patcher.model[0].weight.any()
    assert patcher.model.training == "patched"
    assert patcher.clone().get_model_object("1") is patcher.model[1]
    untouched = ModelPatcher(patcher.model, CPU, CPU)
    assert untouched.get_model_object("1") is layer, "without the swaps of others"
    untouched.forge_unpatch_model()
    assert patcher.model[0].weight is weight
    assert patcher.model[1] is layer
    assert patcher.model.training is True
    assert [name for name, _ in patcher.model.named_parameters()] == [name for name, _ in other.model.named_parameters()]


def test_moving_is_remembered() -> None:
    patcher = ModelPatcher(nn.Linear(2, 2), torch.device("meta"), CPU)
    assert patcher.current_device == CPU
    patcher.forge_patch_model(torch.device("meta"))
    assert patcher.current_device == torch.device("meta")
    assert patcher.model.weight.is_meta


def test_hooks_with_tensors_move_along() -> None:
    class Movable:
        def __init__(self, device: object = None) -> None:
            self.device = device

        def to(self, device: object) -> Movable:
            return Movable(device)

    patcher = _patcher()
    patcher.set_model_attn1_patch(Movable())
    patcher.set_model_attn1_replace(Movable(), "input", 1)
    patcher.set_model_unet_function_wrapper(Movable())
    patcher.model_patches_to(torch.device("meta"))
    options = patcher.model_options
    hooks = [options["transformer_options"]["patches"]["attn1_patch"][0], options["transformer_options"]["patches_replace"]["attn1"][("input", 1)],
             options["model_function_wrapper"]]  # fmt: skip
    assert all(hook.device == torch.device("meta") for hook in hooks)


def test_state_dict_types_and_memory(unet: UnetPatcher) -> None:
    assert set(unet.model_state_dict("predictor.")) == {"predictor.sigmas", "predictor.log_sigmas", "predictor.alphas_cumprod"}
    assert unet.model_dtype() == torch.float32
    assert _patcher().model_dtype() == torch.float32
    assert _patcher().memory_required([1, 4, 8, 8]) == 0
    assert unet.memory_required([1, 4, 8, 8]) == unet.model.memory_required([1, 4, 8, 8])


def test_a_patcher_for_a_model_takes_the_devices_of_memory_management() -> None:
    patcher = UnetPatcher.from_model(KModel(build_models(Path("none"), "sd15").unet, Prediction()))
    assert patcher.load_device.type in ("cpu", "cuda")
    assert patcher.current_device == CPU
    given = UnetPatcher.from_model(patcher.model, load_device=torch.device("meta"), offload_device=CPU)
    assert (given.load_device.type, given.offload_device) == ("meta", CPU)
