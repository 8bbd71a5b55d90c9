"""The engine's configuration: defaults, flags, contradictions."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.args import BackendConfig, ConfigError, add_backend_arguments, backend_config_from_namespace, parse_bytes, parse_device_ids


def config_of(*words: str) -> BackendConfig:
    parser = argparse.ArgumentParser()
    add_backend_arguments(parser)
    return backend_config_from_namespace(parser.parse_args(words))


def test_no_flags_are_the_defaults() -> None:
    assert config_of() == BackendConfig()


def test_the_value_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BackendConfig().profile = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("--device-id 0,2", {"device_ids": ("0", "2")}),
        ("--device-id cpu,cpu", {"device_ids": ("cpu", "cpu")}),
        ("--device-id 0,0 --allow-shared-slots", {"device_ids": ("0", "0"), "allow_shared_slots": True}),
        ("--multi-gpu --multi-gpu-strategy layers", {"multi_gpu": True, "multi_gpu_strategy": "layers"}),
        ("--virtual-gpus 6GB,512MB", {"virtual_gpus_bytes": (6 * 2**30, 512 * 2**20)}),
        ("--cpu-threads-per-slot 2", {"cpu_threads_per_slot": 2}),
        ("--always-gpu", {"vram_mode": "always_gpu"}),
        ("--always-high-vram", {"vram_mode": "high"}),
        ("--always-normal-vram", {"vram_mode": "normal"}),
        ("--always-low-vram", {"vram_mode": "low"}),
        ("--lowvram", {"vram_mode": "low"}),
        ("--lowvram --always-low-vram", {"vram_mode": "low"}),
        ("--always-no-vram", {"vram_mode": "no"}),
        ("--always-cpu", {"vram_mode": "cpu"}),
        ("--use-cpu all", {"vram_mode": "cpu"}),
        ("--use-cpu interrogate", {}),
        ("--medvram", {"vram_mode": "normal", "always_offload": True}),
        ("--always-offload-from-vram", {"always_offload": True}),
        ("--cpu-offload --pin-shared-memory --cuda-stream", {"cpu_offload": True, "pin_shared_memory": True, "cuda_stream": True}),
        ("--cuda-malloc", {"cuda_malloc": True}),
        ("--cuda-graphs auto", {"cuda_graphs": "auto"}),
        ("--unet-in-bf16 --vae-in-fp16 --clip-in-fp8-e5m2", {"unet_dtype": "bf16", "vae_dtype": "fp16", "clip_dtype": "fp8_e5m2"}),
        ("--unet-in-fp8-e4m3fn", {"unet_dtype": "fp8_e4m3fn"}),
        ("--no-half-vae", {"vae_dtype": "fp32"}),
        ("--no-half-vae --vae-in-fp32", {"vae_dtype": "fp32"}),
        ("--vae-in-cpu", {"vae_in_cpu": True}),
        ("--fast-fp8", {"fast_fp8": True}),
        ("--compile-dequantization", {"compile_dequantization": True}),
        ("--all-in-fp16", {"all_in": "fp16"}),
        ("--no-half", {"all_in": "fp32"}),
        ("--xformers", {"attention": "xformers"}),
        ("--disable-xformers", {"attention": "pytorch"}),
        ("--disable-xformers --attention-split", {"attention": "split"}),
        ("--opt-sdp-attention --attention-pytorch", {"attention": "pytorch"}),
        ("--opt-sub-quad-attention", {"attention": "quad"}),
        ("--force-upcast-attention", {"force_upcast_attention": True}),
        ("--disable-attention-upcast", {"disable_attention_upcast": True}),
        ("--pytorch-deterministic", {"deterministic": True}),
        ("--profile --disable-gpu-warning", {"profile": True, "disable_gpu_warning": True}),
    ],
)
def test_each_flag_changes_its_field_alone(words: str, changed: dict[str, object]) -> None:
    assert config_of(*words.split()) == dataclasses.replace(BackendConfig(), **changed)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--device-id 0,0", "--allow-shared-slots"),
        ("--device-id 0,a", "'a' is not a device"),
        ("--device-id 0,", "'' is not a device"),
        ("--device-id -1", "'-1' is not a device"),
        ("--gpu-device-id 1 --device-id 0", "--gpu-device-id 1 and --device-id 0"),
        ("--gpu-device-id -2", "counted from 0"),
        ("--virtual-gpus 6XB", "6XB"),
        ("--virtual-gpus 4GB,", "not an amount of memory"),
        ("--virtual-gpus 6", "at least 1MB"),
        ("--cpu-threads-per-slot 0", "at least 1"),
        ("--always-gpu --medvram", "--always-gpu and --medvram"),
        ("--lowvram --medvram", "--medvram and --lowvram"),
        ("--use-cpu all --always-gpu", "--use-cpu all"),
        ("--always-cpu --device-id 0", "--always-cpu"),
        ("--always-cpu --virtual-gpus 1GB", "--virtual-gpus"),
        ("--all-in-fp16 --no-half", "--all-in-fp16 and --no-half"),
        ("--unet-in-fp16 --unet-in-bf16", "--unet-in-bf16 and --unet-in-fp16"),
        ("--no-half-vae --vae-in-fp16", "--vae-in-fp16 and --no-half-vae"),
        ("--xformers --attention-split", "--xformers and --attention-split"),
        ("--xformers --disable-xformers", "contradict"),
        ("--force-upcast-attention --disable-attention-upcast", "contradict"),
    ],
)
def test_contradictions_name_the_flags(words: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(*words.split())
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        {"multi_gpu_strategy": "fast"},
        {"vram_mode": "x"},
        {"attention": "flash"},
        {"unet_dtype": "int8"},
        {"all_in": "bf16"},
        {"device_ids": ("gpu",)},
    ],
)
def test_a_value_made_by_hand_is_checked_too(field: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        BackendConfig(**field)  # type: ignore[arg-type]


def test_device_names_are_brought_to_one_form() -> None:
    assert parse_device_ids("cuda:1, 02,CPU") == ("1", "2", "cpu")


@given(
    st.integers(1, 4096), st.sampled_from([("", 1), ("K", 2**10), ("M", 2**20), ("G", 2**30), ("T", 2**40)]), st.sampled_from(["", "B", "iB", "ib"])
)
def test_bytes_are_counted_in_powers_of_1024(number: int, unit: tuple[str, int], suffix: str) -> None:
    assert parse_bytes(f"{number}{unit[0]}{suffix if unit[0] else 'B'}") == number * unit[1]


def test_bytes_may_have_a_fraction() -> None:
    assert parse_bytes("1.5 gb") == 3 * 2**29
