"""Applying a LoRA to a full-width UNet, changing its strength and removing it, against a copy of the same weights in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from backend.patcher.base import ModelPatcher
from backend.patcher.lora_math import LoraPatch
from backend.patcher.weight_patches import WeightPatch
from benchmarks._checkpoint_files import sdxl_networks
from tools.measure import Bench, Metrics, Variant

RANK = 16
GB = 1e9


@cache
def _network(name: str) -> tuple[nn.Module, dict[str, WeightPatch]]:
    """A UNet with random fp16 weights, and a LoRA for all its layers except norms and biases."""
    with torch.device("meta"):
        unet = sdxl_networks()[0] if name == "SDXL" else UNet2DConditionModel(cross_attention_dim=768)  # the library's default is SD1.x
    nn.Module.to(unet, torch.float16).to_empty(device="cpu").requires_grad_(False)
    patches: dict[str, WeightPatch] = {}
    for key, weight in unet.named_parameters():
        weight.copy_(torch.rand(()).half())
        if weight.ndim >= 2:
            patches[key] = LoraPatch(up=torch.randn(weight.shape[0], RANK) * 0.01, down=torch.randn(RANK, *weight.shape[1:]) * 0.01, alpha=8.0)
    return unet, patches


def _copy(name: str) -> Metrics:
    unet, patches = _network(name)
    began_s = time.perf_counter()
    copies = {key: weight.clone() for key, weight in unet.named_parameters() if key in patches}
    num_bytes = sum(weight.nbytes for weight in copies.values())
    return {"GB": num_bytes / GB, "copy s": time.perf_counter() - began_s}


def _use(name: str) -> Metrics:
    unet, patches = _network(name)
    metrics: dict[str, float] = {"GB": sum(weight.nbytes for key, weight in unet.named_parameters() if key in patches) / GB}
    for step, strength in (("apply", 0.8), ("other strength", 0.5), ("nothing new", 0.5), ("remove", 0.0)):
        patcher = ModelPatcher(unet, torch.device("cpu"), torch.device("cpu"))
        if strength:
            patcher.add_patches(filename="bench", patches=patches, strength_patch=strength)
        metrics[f"{step} s"] = _seconds(patcher.refresh_loras)
    return metrics


def _seconds(call: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def _make_variants() -> Mapping[str, Variant]:
    return {f"{name}, {what}": partial(call, name) for name in ("SD1.5", "SDXL") for what, call in (("copy", _copy), ("LoRA", _use))}


BENCH = Bench(
    question="What do applying, changing and removing a LoRA of rank 16 over all layers cost, compared with one copy of the same weights? "
    "Weights are fp16 on the host; each is turned to fp32 and back one at a time.",
    make_variants=_make_variants,
    baseline="SD1.5, copy",
    num_rounds=3,
    num_warmups=1,
    packages=("torch", "diffusers"),
)
