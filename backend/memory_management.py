"""Where models are, under the names that extensions know, all of them aware of several devices.

Call `configure(config, slots)` first; otherwise the first use configures a default. Importing this module probes nothing.
The decisions are pure modules in `backend.memory`; `backend.memory.store` moves the bytes, `backend.memory.current` holds the process's store, and
`backend.memory.shortages` recovers and explains. Knows no page and no job.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn

from backend import profiler
from backend.args import BackendConfig
from backend.devices.inventory import DeviceFacts, describe_device
from backend.devices.slot import canonical_device
from backend.memory import dtype_policy
from backend.memory.budget import DEFAULT_INFERENCE_BYTES, partial_load_budget_bytes, reserve_bytes
from backend.memory.current import configure as configure
from backend.memory.current import current_store as current_store
from backend.memory.dtype_policy import MemoryPressure, dtype_from_flag
from backend.memory.errors import DeviceRow
from backend.memory.module_bytes import count_module_bytes, count_state_dict_bytes, count_state_dict_parameters, most_common_dtype, move_module
from backend.memory.placement import ModelNeed, Placement, select_slot
from backend.memory.recovery import is_out_of_memory as is_out_of_memory
from backend.memory.residents import LoadedModel as LoadedModel
from backend.memory.residents import Placeable
from backend.memory.shortages import entries_of
from backend.memory.shortages import explain_shortage as explain_shortage
from backend.memory.shortages import explaining_shortages as explaining_shortages
from backend.memory.shortages import out_of_memory as out_of_memory
from backend.memory.shortages import run_with_recovery as run_with_recovery
from backend.memory.streaming import choose_resident_layers, list_layers
from backend.memory.vram_state import CPUState as CPUState
from backend.memory.vram_state import VRAMState, choose_cpu_state

if TYPE_CHECKING:
    from backend.devices.slot import Slot

DeviceLike = torch.device | str | None

cpu = torch.device("cpu")
OOM_EXCEPTION = torch.OutOfMemoryError
VAE_ALWAYS_TILED = False
lowvram_available = True
directml_enabled = False
current_inference_memory = DEFAULT_INFERENCE_BYTES
"""Bytes reserved for activations; the GPU Weights slider sets it through `set_inference_memory`."""

_HALF_AND_FULL = (torch.float16, torch.bfloat16, torch.float32)


# set-up


def set_inference_memory(inference_bytes: int) -> None:
    """Reserve this many bytes of a device for activations."""
    global current_inference_memory  # noqa: PLW0603 - the surface has it as a module variable, which extensions set too
    current_inference_memory = max(0, int(inference_bytes))


def minimum_inference_memory() -> int:
    """Bytes of the primary device reserved for activations."""
    return reserve_bytes(current_inference_memory, current_store().bytes_of(get_torch_device()).total_bytes)


def _state_facts() -> dict[str, Callable[[], Any]]:
    """Names that are module variables in Forge but depend on the devices here. The module's `__getattr__` reads them."""
    return {
        "vram_state": lambda: vram_state_of(get_torch_device()),
        "set_vram_to": lambda: vram_state_of(get_torch_device()),
        "cpu_state": lambda: choose_cpu_state(_facts(None).kind),
        "total_vram": lambda: get_total_memory(get_torch_device()) / 2**20,
        "total_ram": lambda: get_total_memory(cpu) / 2**20,
        "xpu_available": is_intel_xpu,
        "torch_device_name": lambda: get_torch_device_name(get_torch_device()),
        "current_loaded_models": lambda: current_store().residents,
        "signal_empty_cache": lambda: current_store().wants_empty_cache,
        "VAE_DTYPES": lambda: list(dtype_policy.choose_vae_dtypes(_facts(None))),
        "FORCE_FP32": lambda: _config().all_in == "fp32",
        "FORCE_FP16": lambda: _config().all_in == "fp16",
        "ALWAYS_VRAM_OFFLOAD": lambda: _config().always_offload,
        "PIN_SHARED_MEMORY": lambda: _config().pin_shared_memory,
        "XFORMERS_IS_AVAILABLE": xformers_enabled,
        "XFORMERS_ENABLED_VAE": xformers_enabled_vae,
        "XFORMERS_VERSION": lambda: importlib.metadata.version("xformers") if _xformers_is_installed() else "",
        "ENABLE_PYTORCH_ATTENTION": pytorch_attention_enabled,
    }


def __getattr__(name: str) -> Any:
    facts = _state_facts()
    if name not in facts:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return facts[name]()


def _config() -> BackendConfig:
    return current_store().config


def _device(device: DeviceLike) -> torch.device:
    """The device; the primary one for None."""
    return get_torch_device() if device is None else canonical_device(device)


def _facts(device: DeviceLike) -> DeviceFacts:
    return describe_device(_device(device))


# devices


def get_torch_device() -> torch.device:
    """The primary slot's device."""
    return current_store().primary.torch_device


def compute_slots() -> tuple[Slot, ...]:
    """Slots that may compute: all with `--multi-gpu`, else the first."""
    store = current_store()
    return store.slots if store.config.multi_gpu else store.slots[:1]


def synchronize(device: DeviceLike) -> None:
    """Wait until a device has finished all its work. Devices other than accelerators work synchronously."""
    device = _device(device)
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).synchronize()


def lose_device(device: DeviceLike) -> None:
    """Drop a dead device: its slots take no more work, and everything on it is gone. If it was the primary, the next device becomes it."""
    current_store().lose(_device(device))


def lost_devices() -> frozenset[torch.device]:
    """Devices that have stopped working since the program started."""
    return current_store().lost_devices


def get_torch_device_name(device: DeviceLike) -> str:
    """ "cuda:0 NAME : allocator" for CUDA, "device NAME" for other devices."""
    device, facts = _device(device), _facts(device)
    allocator = f" : {torch.cuda.get_allocator_backend()}" if device.type == "cuda" else ""
    return f"{device} {facts.name}{allocator}"


def vram_state_of(device: DeviceLike = None) -> VRAMState:
    """State of one device; the primary for None."""
    return current_store().state_of(_device(device))


def set_vram_state(state: VRAMState | None) -> None:
    """Use all GPUs as `state` says from now on, or as the flags say for None. Call it between jobs: models are evicted first."""
    current_store().force_state(state)


def is_intel_xpu() -> bool:
    return _facts(None).kind == "xpu"


def is_nvidia() -> bool:
    return _facts(None).kind == "cuda"


def cpu_mode() -> bool:
    return _facts(None).kind == "cpu"


def mps_mode() -> bool:
    return _facts(None).kind == "mps"


def is_device_type(device: DeviceLike, type: str) -> bool:
    return device is not None and torch.device(device).type == type


def is_device_cpu(device: DeviceLike) -> bool:
    return is_device_type(device, "cpu")


def is_device_mps(device: DeviceLike) -> bool:
    return is_device_type(device, "mps")


def is_device_cuda(device: DeviceLike) -> bool:
    return is_device_type(device, "cuda")


def get_autocast_device(dev: DeviceLike) -> str:
    return _device(dev).type


# bytes


@overload
def get_total_memory(dev: DeviceLike = ..., torch_total_too: Literal[False] = ...) -> int: ...
@overload
def get_total_memory(dev: DeviceLike = ..., *, torch_total_too: Literal[True]) -> tuple[int, int]: ...
def get_total_memory(dev: DeviceLike = None, torch_total_too: bool = False) -> int | tuple[int, int]:
    """Bytes of a device; with `torch_total_too` also the bytes that torch's allocator has reserved."""
    now = current_store().bytes_of(_device(dev))
    return (now.total_bytes, now.reserved_bytes) if torch_total_too else now.total_bytes


@overload
def get_free_memory(dev: DeviceLike = ..., torch_free_too: Literal[False] = ...) -> int: ...
@overload
def get_free_memory(dev: DeviceLike = ..., *, torch_free_too: Literal[True]) -> tuple[int, int]: ...
def get_free_memory(dev: DeviceLike = None, torch_free_too: bool = False) -> int | tuple[int, int]:
    """Bytes a new tensor may use: the driver's free bytes plus the allocator's idle bytes; with `torch_free_too` also the latter alone."""
    now = current_store().bytes_of(_device(dev))
    return (now.free_bytes, now.idle_bytes) if torch_free_too else now.free_bytes


def state_dict_size(sd: Mapping[str, object], exclude_device: DeviceLike = None) -> int:
    """Bytes of the tensors, except those on `exclude_device`."""
    return count_state_dict_bytes(sd, None if exclude_device is None else _device(exclude_device))


def state_dict_parameters(sd: Mapping[str, object]) -> int:
    """Number of elements of all tensors."""
    return count_state_dict_parameters(sd)


def state_dict_dtype(sd: Mapping[str, object]) -> torch.dtype:
    """The most common dtype of the tensors."""
    return most_common_dtype(sd)


def dtype_size(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return dtype.itemsize


@overload
def module_size(module: nn.Module, exclude_device: DeviceLike = ..., include_device: DeviceLike = ..., return_split: Literal[False] = ...) -> int: ...
@overload
def module_size(
    module: nn.Module, exclude_device: DeviceLike = ..., include_device: DeviceLike = ..., *, return_split: Literal[True]
) -> tuple[int, int, int]: ...
def module_size(
    module: nn.Module, exclude_device: DeviceLike = None, include_device: DeviceLike = None, return_split: bool = False
) -> int | tuple[int, int, int]:
    """Bytes of a module's distinct tensors, optionally only those on or off a device; with `return_split` (total, "weight" tensors, others)."""
    exclude, include = (None if one is None else _device(one) for one in (exclude_device, include_device))
    counted = count_module_bytes(module, lambda tensor: tensor.device != exclude and (include is None or tensor.device == include))
    return (counted.total_bytes, counted.weight_bytes, counted.other_bytes) if return_split else counted.total_bytes


def module_move(module: nn.Module, device: DeviceLike, recursive: bool = True, excluded_pattens: Sequence[str] = ()) -> nn.Module:
    """Move a module's whole tree, or only its own tensors, except names that match a shell-style pattern. Returns the module."""
    move_module(module, _device(device), recursive=recursive, excluded_patterns=excluded_pattens)
    return module


def compute_model_gpu_memory_when_using_cpu_swap(current_free_mem: int, inference_memory: int) -> int:
    """Bytes of weights that may stay while the rest streams."""
    return partial_load_budget_bytes(current_free_mem, inference_memory)


def build_module_profile(model: nn.Module, model_gpu_memory_when_using_cpu_swap: int) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Layers that would stay on the device, layers of which only small parameters would stay, and layers that would stream.

    The middle list is always empty: here a layer moves as a whole.
    """
    by_name = dict(model.named_modules())
    layers = list_layers(model)
    resident = choose_resident_layers(layers, model_gpu_memory_when_using_cpu_swap)
    return [by_name[one.name] for one in layers if one.name in resident], [], [by_name[one.name] for one in layers if one.name not in resident]


# placing models


def load_models_gpu(models: Iterable[Placeable], memory_required: int = 0, hard_memory_preservation: int = 0) -> None:
    """Make models resident on their load devices, with room for `memory_required` bytes of working memory.

    Evicts the least recently used others; a model that does not fit whole streams. Raises: OutOfMemory.
    """
    with profiler.recorder().measure("load", "move models"):
        current_store().load(
            models,
            memory_required_bytes=int(memory_required),
            inference_bytes=current_inference_memory,
            preserved_bytes=int(hard_memory_preservation),
        )


def load_model_gpu(model: Placeable) -> None:
    """`load_models_gpu` for one model."""
    load_models_gpu([model])


def free_memory(memory_required: int, device: DeviceLike, keep_loaded: Sequence[object] = (), free_all: bool = False) -> None:
    """Evict from a device, least recently used first, until more than `memory_required` bytes are free.

    `keep_loaded`: residents or patchers that stay.
    """
    current_store().free(int(memory_required), _device(device), keep=entries_of(keep_loaded), free_all=free_all)


def unload_model_clones(model: Placeable) -> None:
    """Drop the entries of this patcher's network without moving weights."""
    current_store().forget_network(model)


def unload_all_models() -> None:
    """Take every model off every device."""
    current_store().unload_all()


def cleanup_models() -> None:
    """Drop the entries of networks that no longer exist."""
    current_store().drop_dead()


def soft_empty_cache(force: bool = False) -> None:
    """Release idle allocator memory: on every device with `force`, else if the state is below NORMAL or a load requested it."""
    store = current_store()
    for device in dict.fromkeys(slot.torch_device for slot in store.slots):
        state = store.state_of(device)
        if force or store.wants_empty_cache or VRAMState.DISABLED < state < VRAMState.NORMAL_VRAM:
            store.empty_cache(device, collect=force)


def describe_devices() -> tuple[DeviceRow, ...]:
    """A row per device: total, free, and the models on it."""
    return current_store().describe()


def hold_models(models: Iterable[Placeable]) -> None:
    """Protect a job's models from eviction until the next call. Pass an empty list when the job has ended."""
    current_store().hold(models)


def release_after_job() -> None:
    """Between jobs, evict all models and release idle memory on devices below NORMAL, and everywhere with `--always-offload-from-vram`."""
    store = current_store()
    for device in dict.fromkeys(entry.device for entry in store.residents):
        if store.config.always_offload or VRAMState.DISABLED < store.state_of(device) < VRAMState.NORMAL_VRAM:
            store.free(0, device, free_all=True)
    soft_empty_cache()


# where parts go, and in which dtype


def unet_offload_device() -> torch.device:
    return get_torch_device() if vram_state_of() == VRAMState.HIGH_VRAM else cpu


def unet_inital_load_device(parameters: int, dtype: torch.dtype) -> torch.device:
    """Where a UNet is loaded to: directly to the device if it fits there, else to the host."""
    device = get_torch_device()
    if vram_state_of() == VRAMState.HIGH_VRAM:
        return device
    if _config().always_offload or vram_state_of() < VRAMState.NORMAL_VRAM:
        return cpu
    free_bytes = current_store().bytes_of(device).free_bytes
    return device if parameters * dtype.itemsize + minimum_inference_memory() < free_bytes else cpu


def text_encoder_device(model_bytes: int = 0) -> torch.device:
    """Where text encoders run: on a slot other than the UNet's if one has room for `model_bytes`."""
    return _component_device("text encoder", model_bytes)


def text_encoder_offload_device() -> torch.device:
    return get_torch_device() if _config().vram_mode == "always_gpu" else cpu


def vae_device(model_bytes: int = 0) -> torch.device:
    """Where the VAE runs: on a slot other than the UNet's if one has room for `model_bytes`."""
    return cpu if _config().vae_in_cpu else _component_device("VAE", model_bytes)


def _component_device(name: str, model_bytes: int) -> torch.device:
    """The slot of the primary's kind with the most room, other than the primary, so that the UNet can stay; else the primary."""
    primary, *others = compute_slots()
    others = [slot for slot in others if slot.torch_device.type == primary.torch_device.type]
    placement = select_slot(ModelNeed(name=name, weights_bytes=model_bytes), current_store().rooms(others))
    return next((slot.torch_device for slot in others if slot.index == placement.slot_index), primary.torch_device)


def select_gpu_by_available_memory(model: Placeable | nn.Module, memory_required: int = 0) -> Placement:
    """The compute slot where a model and its working memory fit best. If they fit nowhere, `slot_index` is None and `reason` has the numbers."""
    module: nn.Module = model if isinstance(model, nn.Module) else model.model
    need = ModelNeed(name=type(module).__name__, weights_bytes=count_module_bytes(module).total_bytes, working_bytes=int(memory_required))
    return select_slot(need, current_store().rooms(compute_slots(), module))


def vae_offload_device() -> torch.device:
    return vae_device() if _config().vram_mode == "always_gpu" else cpu


def intermediate_device() -> torch.device:
    return get_torch_device() if _config().vram_mode == "always_gpu" else cpu


def unet_dtype(device: DeviceLike = None, model_params: int = 0, supported_dtypes: Sequence[torch.dtype] = _HALF_AND_FULL) -> torch.dtype:
    """Storage type of a UNet: the flag's, else the best for the device."""
    pressure = _pressure(device, model_params, only_storage=True)
    return unet_dtype_from_flags() or dtype_policy.choose_dtype(_facts(device), supported_dtypes, pressure)


def unet_dtype_from_flags() -> torch.dtype | None:
    """Storage type of a UNet from a flag; None without one."""
    return dtype_from_flag(_config().unet_dtype or _config().all_in)


def get_computation_dtype(
    inference_device: DeviceLike = None, parameters: int = 0, supported_dtypes: Sequence[torch.dtype] = _HALF_AND_FULL
) -> torch.dtype:
    """Type to compute in: full precision on a CPU, elsewhere the best half type that the device runs at full rate."""
    forced = dtype_from_flag(_config().all_in)
    if forced is not None and dtype_policy.supports_dtype(_facts(inference_device), forced):
        return forced
    return dtype_policy.choose_dtype(_facts(inference_device), supported_dtypes, _pressure(inference_device, parameters))


def text_encoder_dtype(device: DeviceLike = None) -> torch.dtype:
    """Storage type of text encoders: the flag's, else half precision on GPUs that run it and fp32 elsewhere."""
    config = _config()
    forced = dtype_from_flag(config.clip_dtype or config.all_in)
    return forced or dtype_policy.choose_dtype(_facts(device), (torch.float16, torch.float32), MemoryPressure())


def vae_dtype(device: DeviceLike = None, allowed_dtypes: Sequence[torch.dtype] = ()) -> torch.dtype:
    """Type of a VAE: the flag's, else the best that the device runs without overflow."""
    forced = dtype_from_flag(_config().vae_dtype or ("fp32" if _config().all_in == "fp32" else None))
    if forced is not None:
        return forced
    usable = dtype_policy.choose_vae_dtypes(_facts(vae_device() if device is None else device))
    return next((dtype for dtype in usable if not allowed_dtypes or dtype in allowed_dtypes), torch.float32)


def should_use_fp16(device: DeviceLike = None, model_params: int = 0, prioritize_performance: bool = True, manual_cast: bool = False) -> bool:
    if _config().all_in:
        return _config().all_in == "fp16"
    return dtype_policy.uses_fp16(_facts(device), _pressure(device, model_params, only_storage=manual_cast, prefers_speed=prioritize_performance))


def should_use_bf16(device: DeviceLike = None, model_params: int = 0, prioritize_performance: bool = True, manual_cast: bool = False) -> bool:
    if _config().all_in:
        return False
    return dtype_policy.uses_bf16(_facts(device), _pressure(device, model_params, only_storage=manual_cast, prefers_speed=prioritize_performance))


def _pressure(device: DeviceLike, parameters: int, *, only_storage: bool = False, prefers_speed: bool = True) -> MemoryPressure:
    free_bytes = max(0, current_store().bytes_of(_device(device)).free_bytes - minimum_inference_memory())
    return MemoryPressure(parameters=parameters, free_bytes=free_bytes, only_storage=only_storage, prefers_speed=prefers_speed)


def supports_dtype(device: DeviceLike, dtype: torch.dtype) -> bool:
    """Whether the device computes in `dtype` at a reasonable rate."""
    return dtype_policy.supports_dtype(_facts(device), dtype)


def multiplies_fp8() -> bool:
    """Whether products of e4m3 weights run in fp8: it was asked for, and every slot that computes can. Slots that differed would give other bits."""
    return _config().fast_fp8 and all(dtype_policy.multiplies_fp8(_facts(slot.torch_device)) for slot in compute_slots())


def supports_cast(device: DeviceLike, dtype: torch.dtype) -> bool:
    """Whether weights may be stored as `dtype` on the device and cast for use."""
    is_fp8 = dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    return dtype in _HALF_AND_FULL or (is_fp8 and _facts(device).kind != "mps")


def pick_weight_dtype(dtype: torch.dtype | None, fallback_dtype: torch.dtype, device: DeviceLike = None) -> torch.dtype:
    """`dtype` if it is no wider than the fallback and the device can cast it, else the fallback."""
    if dtype is None or dtype.itemsize > fallback_dtype.itemsize or not supports_cast(device, dtype):
        return fallback_dtype
    return dtype


def device_supports_non_blocking(device: DeviceLike) -> bool:
    return _device(device).type in ("cuda", "xpu")


def device_should_use_non_blocking(device: DeviceLike) -> bool:
    """False: an unordered copy is safe only where its stream is known, and that code requests it itself."""
    return False


def cast_to_device(tensor: torch.Tensor, device: DeviceLike, dtype: torch.dtype, copy: bool = False) -> torch.Tensor:
    """A tensor on `device` in `dtype`; the same object if nothing changes and no copy is requested."""
    return tensor.to(device=_device(device), dtype=dtype, copy=copy)


# attention


def _xformers_is_installed() -> bool:
    return importlib.util.find_spec("xformers") is not None


def xformers_enabled() -> bool:
    """Whether to use xformers for attention: a flag requests it, the package is installed, and the GPU has its kernels."""
    if _facts(None).kind not in ("cuda", "rocm") or _config().attention not in ("auto", "xformers"):
        return False
    return _config().attention == "xformers" and _xformers_is_installed()


def xformers_enabled_vae() -> bool:
    return xformers_enabled()


def pytorch_attention_enabled() -> bool:
    return _config().attention in ("auto", "pytorch") or (_config().attention == "xformers" and not xformers_enabled())


def pytorch_attention_flash_attention() -> bool:
    return pytorch_attention_enabled() and is_nvidia()


def force_upcast_attention_dtype() -> torch.dtype | None:
    """fp32 if a flag requests attention scores in full precision, else None."""
    return torch.float32 if _config().force_upcast_attention else None


def force_channels_last() -> bool:
    return False


def can_install_bnb() -> bool:
    """Whether bitsandbytes' kernels can run, which needs CUDA 11.7 or later."""
    version = torch.version.cuda
    return is_nvidia() and version is not None and tuple(int(part) for part in version.split(".")[:2]) >= (11, 7)
