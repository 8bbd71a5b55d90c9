"""Devices and dtypes under the names that extensions import, and the NaN check. backend/memory_management.py makes the decisions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from backend import memory_management
from backend.nn.nan_search import LayerNansError, check_finite
from modules.errors import RequestError
from modules.jobs.context import installed_context

cpu = torch.device("cpu")
fp8 = False
force_fp16 = False
nv_rng = None


class NansException(RequestError):
    """The model produced nothing but NaN."""

    status = 500


_ADVICE = {
    "unet": (
        "The UNet produced only NaN. The cause is either the precision (start with --all-in-fp32 or --force-upcast-attention) "
        "or a broken checkpoint file. Another sampler or a lower CFG scale may help. --disable-nan-check skips this check."
    ),
    "vae": ("The VAE produced only NaN. Start with --no-half-vae (or --vae-in-fp32), or choose another VAE. --disable-nan-check skips this check."),
}


def test_for_nans(x: torch.Tensor, where: str) -> None:
    """Raise NansException if `x`, the output of "unet" or "vae", is NaN everywhere, unless --disable-nan-check is set."""
    if _flag("disable_nan_check") or not bool(torch.isnan(x).all()):
        return
    raise NansException(_ADVICE.get(where, f"{where} produced only NaN."))


def test_layers_for_nans(model: Any, output: torch.Tensor, run: Callable[[], object]) -> None:
    """Raise NansException with the layer's name when a flow model's step in fp16 gave NaN, unless --disable-nan-check. `run()` does the step again.

    Transformers of flow models were trained in bfloat16, which holds greater numbers. Other models are looked at once, when all steps are done.
    """
    is_in_danger = getattr(model, "computation_dtype", None) == torch.float16 and model.predictor.is_flow
    if not is_in_danger or _flag("disable_nan_check"):
        return
    try:
        check_finite(model.diffusion_model, output, run)
    except LayerNansError as error:
        raise NansException(str(error)) from error


def _flag(name: str) -> bool:
    app = installed_context()
    return app is not None and bool(app.config.flags.get(name, False))


def torch_gc() -> None:
    """Release cached memory of the devices."""
    memory_management.soft_empty_cache()


def get_optimal_device() -> torch.device:
    return memory_management.get_torch_device()


def get_optimal_device_name() -> str:
    return str(get_optimal_device())


def get_cuda_device_string() -> str:
    return str(get_optimal_device())


def get_device_for(task: str) -> torch.device:
    """The device of "vae", "clip" or anything else (the UNet's)."""
    if task == "vae":
        return memory_management.vae_device()
    return memory_management.text_encoder_device() if task in ("clip", "text_encoder") else get_optimal_device()


def has_mps() -> bool:
    return torch.backends.mps.is_available()


def has_xpu() -> bool:
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def autocast(disable: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Does nothing: dtypes are set on the models."""
    return contextlib.nullcontext()


def without_autocast(disable: bool = False) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def manual_cast(target_dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def cond_cast_unet(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_management.unet_dtype())


def cond_cast_float(x: torch.Tensor) -> torch.Tensor:
    return x.float()


def randn(seed: int, shape: Any, generator: Any = None) -> torch.Tensor:
    """Noise from `seed` according to the setting randn_source, on the CPU."""
    from modules.samplers.noise import randn as noise_of_seed  # it imports this file

    return noise_of_seed(seed, shape, generator)


def randn_without_seed(shape: Any, generator: Any = None) -> torch.Tensor:
    from modules.samplers.noise import randn_without_seed as noise  # it imports this file

    return noise(shape, generator)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


_LAZY: dict[str, Callable[[], Any]] = {
    "device": memory_management.get_torch_device,
    "device_interrogate": memory_management.text_encoder_device,
    "device_gfpgan": memory_management.get_torch_device,
    "device_esrgan": memory_management.get_torch_device,
    "device_codeformer": memory_management.get_torch_device,
    "dtype": memory_management.unet_dtype,
    "dtype_unet": memory_management.unet_dtype,
    "dtype_inference": memory_management.unet_dtype,
    "dtype_vae": memory_management.vae_dtype,
}


def __getattr__(name: str) -> Any:
    """`device`, `dtype`, `dtype_vae` and similar names, computed when read."""
    if name in _LAZY:
        return _LAZY[name]()
    if name == "unet_needs_upcast":
        return False
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
