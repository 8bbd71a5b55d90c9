"""Environment variables that must be set before torch and other libraries are imported. Pure: computes variables from the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from modules.app_config import AppConfig


def library_environment(config: AppConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to set. Values set by the user stay unless a flag overrides them.

    `--device-id` sets nothing here: slots are chosen from all devices after probing.
    """
    wanted = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # number GPUs like nvidia-smi does
        "PYTORCH_ENABLE_MPS_FALLBACK": "1",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers run inside worker threads
    }
    variables = {name: value for name, value in wanted.items() if name not in environ}
    gpu_id = config.flags.get("gpu_device_id")
    if gpu_id is not None:
        variables["CUDA_VISIBLE_DEVICES"] = str(gpu_id)  # ROCm reads it too
    if config.backend.cuda_malloc:
        variables["PYTORCH_CUDA_ALLOC_CONF"] = _with_backend(environ.get("PYTORCH_CUDA_ALLOC_CONF", ""), "cudaMallocAsync")
    if config.backend.deterministic and "CUBLAS_WORKSPACE_CONFIG" not in environ:
        variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return variables


def _with_backend(allocator_conf: str, backend: str) -> str:
    """The allocator settings with this backend; a backend set by the user stays."""
    others = [part for part in allocator_conf.split(",") if part and not part.startswith("backend:")]
    return ",".join([*others, f"backend:{backend}"])
