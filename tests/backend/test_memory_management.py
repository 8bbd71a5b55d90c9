"""The API that extensions use: names, signatures and meaning, on a CPU, on virtual GPUs and unconfigured."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from backend import memory_management
from backend.args import BackendConfig
from backend.devices import virtual_gpu
from backend.devices.probing import probe_devices
from backend.memory import current
from backend.memory.errors import OutOfMemory
from backend.patcher.base import ModelPatcher

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Each test starts and leaves the process unconfigured."""
    yield
    memory_management.set_inference_memory(memory_management.DEFAULT_INFERENCE_BYTES)
    current.forget()


def configure(**flags: object) -> None:
    config = BackendConfig(**flags)
    memory_management.configure(config, probe_devices(config))


def patcher(num_kib: int = 4, device: torch.device | None = None) -> ModelPatcher:
    net = nn.Linear(num_kib * 256, 1, bias=False).requires_grad_(False)
    return ModelPatcher(net, load_device=device or memory_management.get_torch_device(), offload_device=torch.device("cpu"))


# the surface: (name, parameters) as extensions call them
SIGNATURES = {
    "get_torch_device": [],
    "get_torch_device_name": ["device"],
    "get_total_memory": ["dev", "torch_total_too"],
    "get_free_memory": ["dev", "torch_free_too"],
    "state_dict_size": ["sd", "exclude_device"],
    "state_dict_parameters": ["sd"],
    "state_dict_dtype": ["sd"],
    "module_size": ["module", "exclude_device", "include_device", "return_split"],
    "module_move": ["module", "device", "recursive", "excluded_pattens"],
    "build_module_profile": ["model", "model_gpu_memory_when_using_cpu_swap"],
    "compute_model_gpu_memory_when_using_cpu_swap": ["current_free_mem", "inference_memory"],
    "minimum_inference_memory": [],
    "unload_model_clones": ["model"],
    "free_memory": ["memory_required", "device", "keep_loaded", "free_all"],
    "load_models_gpu": ["models", "memory_required", "hard_memory_preservation"],
    "load_model_gpu": ["model"],
    "cleanup_models": [],
    "dtype_size": ["dtype"],
    "unet_offload_device": [],
    "unet_inital_load_device": ["parameters", "dtype"],
    "unet_dtype": ["device", "model_params", "supported_dtypes"],
    "get_computation_dtype": ["inference_device", "parameters", "supported_dtypes"],
    "text_encoder_offload_device": [],
    "text_encoder_dtype": ["device"],
    "intermediate_device": [],
    "vae_offload_device": [],
    "vae_dtype": ["device", "allowed_dtypes"],
    "get_autocast_device": ["dev"],
    "supports_dtype": ["device", "dtype"],
    "supports_cast": ["device", "dtype"],
    "pick_weight_dtype": ["dtype", "fallback_dtype", "device"],
    "device_supports_non_blocking": ["device"],
    "device_should_use_non_blocking": ["device"],
    "cast_to_device": ["tensor", "device", "dtype", "copy"],
    "force_channels_last": [],
    "xformers_enabled": [],
    "xformers_enabled_vae": [],
    "pytorch_attention_enabled": [],
    "pytorch_attention_flash_attention": [],
    "force_upcast_attention_dtype": [],
    "is_device_type": ["device", "type"],
    "is_device_cpu": ["device"],
    "is_device_mps": ["device"],
    "is_device_cuda": ["device"],
    "should_use_fp16": ["device", "model_params", "prioritize_performance", "manual_cast"],
    "should_use_bf16": ["device", "model_params", "prioritize_performance", "manual_cast"],
    "can_install_bnb": [],
    "soft_empty_cache": ["force"],
    "unload_all_models": [],
    "is_intel_xpu": [],
    "is_nvidia": [],
    "cpu_mode": [],
    "mps_mode": [],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_have_the_parameters_that_extensions_pass(name: str) -> None:
    assert list(inspect.signature(getattr(memory_management, name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize(
    "name",
    [
        *("vram_state", "set_vram_to", "cpu_state", "total_vram", "total_ram", "lowvram_available", "xpu_available", "directml_enabled"),
        *("OOM_EXCEPTION", "XFORMERS_VERSION", "XFORMERS_IS_AVAILABLE", "XFORMERS_ENABLED_VAE", "ENABLE_PYTORCH_ATTENTION", "VAE_DTYPES"),
        *("VAE_ALWAYS_TILED", "FORCE_FP32", "FORCE_FP16", "ALWAYS_VRAM_OFFLOAD", "PIN_SHARED_MEMORY", "torch_device_name"),
        *("current_loaded_models", "current_inference_memory", "signal_empty_cache", "cpu", "VRAMState", "CPUState", "LoadedModel"),
    ],
)
def test_values_that_extensions_read_exist(name: str) -> None:
    assert getattr(memory_management, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        memory_management.no_such_thing  # noqa: B018


def test_importing_probes_nothing() -> None:
    """In a new process: after the import no store exists and torch's CUDA was not queried."""
    code = (
        "import torch; torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0; "
        "import backend.memory_management; from backend.memory import current; assert current._configured.store is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# on the CPU


def test_nothing_configured_gives_the_first_device() -> None:
    assert memory_management.get_torch_device() == probe_devices(BackendConfig())[0].torch_device


def test_the_cpu_computes_in_full_precision_and_nothing_moves() -> None:
    configure(device_ids=("cpu",))
    assert memory_management.vram_state is memory_management.VRAMState.DISABLED
    assert memory_management.cpu_state is memory_management.CPUState.CPU
    assert memory_management.cpu_mode() and not memory_management.is_nvidia()
    types = [memory_management.unet_dtype(), memory_management.vae_dtype(), memory_management.text_encoder_dtype()]
    assert [*types, memory_management.get_computation_dtype()] == [torch.float32] * 4
    model = patcher()
    memory_management.load_models_gpu([model], memory_required=2**50)
    assert memory_management.current_loaded_models[0].model is model
    assert next(model.model.parameters()).device.type == "cpu"


def test_flags_choose_storage_types() -> None:
    configure(device_ids=("cpu",), unet_dtype="fp8_e4m3fn", vae_dtype="bf16", clip_dtype="fp16")
    assert memory_management.unet_dtype() is torch.float8_e4m3fn
    assert memory_management.vae_dtype() is torch.bfloat16
    assert memory_management.text_encoder_dtype() is torch.float16
    assert memory_management.get_computation_dtype() is torch.float32


def test_all_in_fp16_stores_but_does_not_compute_on_a_cpu() -> None:
    configure(device_ids=("cpu",), all_in="fp16")
    assert memory_management.unet_dtype() is torch.float16
    assert memory_management.get_computation_dtype() is torch.float32
    assert memory_management.FORCE_FP16


def test_free_and_total_bytes() -> None:
    configure(device_ids=("cpu",))
    free_bytes, total_bytes = memory_management.get_free_memory(), memory_management.get_total_memory("cpu")
    assert 0 < free_bytes <= total_bytes
    assert memory_management.total_ram == total_bytes / MIB
    assert memory_management.get_total_memory(torch_total_too=True)[0] == total_bytes


def test_the_reserve_is_the_users_or_a_quarter_of_a_small_card() -> None:
    configure(virtual_gpus_bytes=(64 * MIB,))
    assert memory_management.minimum_inference_memory() == 16 * MIB
    memory_management.set_inference_memory(40 * MIB)
    assert memory_management.minimum_inference_memory() == 40 * MIB
    assert memory_management.current_inference_memory == 40 * MIB


def test_weight_types_are_never_wider_than_the_fallback() -> None:
    configure(device_ids=("cpu",))
    pick = memory_management.pick_weight_dtype
    assert pick(torch.float8_e5m2, torch.float16) is torch.float8_e5m2
    assert pick(torch.float32, torch.float16) is torch.float16
    assert pick(None, torch.float16) is torch.float16
    assert pick(torch.int8, torch.float16) is torch.float16


def test_sizes_and_profiles_of_modules() -> None:
    configure(virtual_gpus_bytes=(MIB,))
    net = nn.Sequential(nn.Linear(256, 4), nn.Linear(256, 1, bias=False)).requires_grad_(False)
    memory_management.module_move(net, "vgpu", recursive=True, excluded_pattens=["0"])
    assert memory_management.module_size(net) == 4096 + 16 + 1024
    assert memory_management.module_size(net, return_split=True) == (5136, 5120, 16)
    assert memory_management.module_size(net, include_device="vgpu:0") == 1024
    assert memory_management.module_size(net, exclude_device="vgpu") == 4112
    assert memory_management.build_module_profile(net, 5136) == ([net[0], net[1]], [], [])
    assert memory_management.build_module_profile(net, 4112 + 1024 - 1) == ([], [], [net[0], net[1]])


# on virtual GPUs


def test_names_work_on_virtual_gpus() -> None:
    configure(virtual_gpus_bytes=(4 * MIB, 2 * MIB), multi_gpu=True)
    first, second = virtual_gpu.installed_devices()
    assert memory_management.get_torch_device() == first
    assert memory_management.get_total_memory(second) == 2 * MIB
    assert memory_management.get_torch_device_name(first) == "vgpu:0 virtual GPU"
    assert memory_management.vram_state_of(second) is memory_management.VRAMState.NORMAL_VRAM
    model = patcher(512, second)
    memory_management.load_models_gpu([model])
    assert memory_management.get_free_memory(second) == 2 * MIB - 512 * 1024
    memory_management.free_memory(0, second, keep_loaded=[model], free_all=True)
    assert model.current_device == second
    memory_management.free_memory(0, "vgpu:1", free_all=True)
    assert model.current_device.type == "cpu"


def test_text_encoder_and_vae_go_to_the_second_slot() -> None:
    configure(virtual_gpus_bytes=(4 * MIB, 2 * MIB), multi_gpu=True)
    assert str(memory_management.text_encoder_device()) == str(memory_management.vae_device()) == "vgpu:1"
    assert str(memory_management.text_encoder_device(3 * MIB)) == "vgpu:0"  # too large for the second
    configure(virtual_gpus_bytes=(4 * MIB, 2 * MIB))
    assert str(memory_management.text_encoder_device()) == "vgpu:0"
    configure(virtual_gpus_bytes=(4 * MIB, 2 * MIB), multi_gpu=True, vae_in_cpu=True)
    assert str(memory_management.vae_device()) == "cpu"


def test_a_cpu_slot_gets_no_component_if_there_is_a_gpu() -> None:
    configure(virtual_gpus_bytes=(4 * MIB,), device_ids=("0", "cpu"), multi_gpu=True)
    assert str(memory_management.vae_device()) == "vgpu:0"


def test_selection_by_available_memory() -> None:
    configure(virtual_gpus_bytes=(4 * MIB, 2 * MIB), multi_gpu=True)
    model = patcher(1024)
    assert memory_management.select_gpu_by_available_memory(model).slot_index == 0
    memory_management.module_move(model.model, "vgpu:1")
    assert memory_management.select_gpu_by_available_memory(model).slot_index == 1
    nowhere = memory_management.select_gpu_by_available_memory(model.model, memory_required=4 * MIB)
    assert nowhere.slot_index is None and "fits on no slot whole" in nowhere.reason


@pytest.mark.parametrize(("flags", "offload"), [({}, "cpu"), ({"vram_mode": "high"}, "vgpu:0"), ({"vram_mode": "always_gpu"}, "vgpu:0")])
def test_where_weights_wait(flags: dict[str, object], offload: str) -> None:
    configure(virtual_gpus_bytes=(4 * MIB,), **flags)
    assert str(memory_management.unet_offload_device()) == offload
    always = "vgpu:0" if flags.get("vram_mode") == "always_gpu" else "cpu"
    places = [memory_management.text_encoder_offload_device(), memory_management.vae_offload_device(), memory_management.intermediate_device()]
    assert [str(place) for place in places] == [always] * 3


def test_a_unet_is_read_straight_to_the_device_when_it_fits() -> None:
    configure(virtual_gpus_bytes=(4 * MIB,))
    assert str(memory_management.unet_inital_load_device(MIB // 4, torch.float32)) == "vgpu:0"
    assert str(memory_management.unet_inital_load_device(4 * MIB, torch.float32)) == "cpu"
    configure(virtual_gpus_bytes=(4 * MIB,), vram_mode="low")
    assert str(memory_management.unet_inital_load_device(1, torch.float32)) == "cpu"


def test_configuring_again_unloads_models() -> None:
    configure(virtual_gpus_bytes=(4 * MIB,))
    model = patcher()
    memory_management.load_model_gpu(model)
    configure(device_ids=("cpu",))
    assert next(model.model.parameters()).device.type == "cpu"


def test_models_leave_devices_that_no_longer_exist() -> None:
    configure(virtual_gpus_bytes=(4 * MIB, 4 * MIB), multi_gpu=True)
    model = patcher(device=virtual_gpu.installed_devices()[1])
    memory_management.load_model_gpu(model)
    configure(virtual_gpus_bytes=(4 * MIB,))
    assert next(model.model.parameters()).device.type == "cpu"


def test_out_of_memory_names_device_and_models() -> None:
    configure(virtual_gpus_bytes=(4 * MIB,))
    model = patcher(1024)
    memory_management.load_model_gpu(model)
    error = memory_management.out_of_memory("decoding 512x512", need_bytes=8 * MIB)
    assert isinstance(error, OutOfMemory)
    assert str(error).splitlines() == [
        "vgpu:0 ran out of memory during decoding 512x512, which needs 8 MiB. "
        "Make the picture or the batch smaller, start with --lowvram, or close other programs that use the device.",
        "  vgpu:0 (virtual GPU): total 4 MiB, free 3 MiB, used by Linear 1 MiB",
    ]


def test_forgetting_clones_moves_no_weight() -> None:
    configure(virtual_gpus_bytes=(4 * MIB,))
    model = patcher()
    memory_management.load_model_gpu(model.clone())
    memory_management.unload_model_clones(model)
    assert memory_management.current_loaded_models == []
    assert str(next(model.model.parameters()).device) == "vgpu:0"


def test_caches_are_emptied_by_force_or_below_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr("backend.memory.store.empty_cache", lambda device: emptied.append(str(device)))
    configure(virtual_gpus_bytes=(4 * MIB, 4 * MIB), multi_gpu=True)
    memory_management.soft_empty_cache()
    assert emptied == []
    memory_management.soft_empty_cache(force=True)
    assert emptied == ["vgpu:0", "vgpu:1"]
    configure(virtual_gpus_bytes=(4 * MIB,), vram_mode="low")
    memory_management.soft_empty_cache()
    assert emptied[2:] == ["vgpu:0"]
