"""Information about this machine for a bug report. Contains no password, no token and no prompt."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.foreign_json import read_json_file
from modules.app_config import SCRIPT_DIR, AppConfig
from modules.launch.version import program_version

_SHOWN_VARIABLES = (
    *("COMMANDLINE_ARGS", "TORCH_COMMAND", "TORCH_INDEX_URL", "REQS_FILE", "XFORMERS_PACKAGE", "VENV_DIR", "IGNORE_CMD_ARGS_ERRORS"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "SD_WEBUI_LOG_LEVEL"),
    *("HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "GRADIO_TEMP_DIR"),
)
_SECRET_FLAGS = ("api_auth", "gradio_auth", "ngrok", "ngrok_options")
_HIDDEN = "(not shown)"


def collect_sysinfo(config: AppConfig, environ: Mapping[str, str]) -> dict[str, Any]:
    """Everything as plain JSON values. Imports torch if it is installed."""
    return {
        # clients read A1111's names
        "Platform": platform.platform(),
        "Python": sys.version,
        "Version": program_version(),
        "Commit": _read_commit(),
        "executable": sys.executable,
        "script_path": str(SCRIPT_DIR),
        "data_path": str(config.data_dir),
        "disk_free_gb": round(shutil.disk_usage(SCRIPT_DIR).free / 2**30, 1),
        "flags": _shown_flags(config.flags),
        "environment": _shown_variables(environ, config.flags),
        "settings": _read_json(config.settings_file),
        "extensions": sorted(path.name for path in config.extensions_dir.glob("*/")) if config.extensions_dir.is_dir() else [],
        "packages": sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()}, key=str.lower),
        "torch": _describe_torch(),
    }


def _shown_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _HIDDEN if name in _SECRET_FLAGS and value else value for name, value in flags.items()}


def _shown_variables(environ: Mapping[str, str], flags: Mapping[str, Any]) -> dict[str, str]:
    """An allowlist of variables; COMMANDLINE_ARGS is hidden if it contains a password."""
    shown = {name: environ[name] for name in _SHOWN_VARIABLES if name in environ}
    if any(flags.get(name) for name in _SECRET_FLAGS) and "COMMANDLINE_ARGS" in shown:
        shown["COMMANDLINE_ARGS"] = _HIDDEN
    return shown


def _read_commit() -> str:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SCRIPT_DIR, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "(unknown)"
    return result.stdout.strip() or "(unknown)"


def _read_json(path: Path) -> Any:
    try:
        return read_json_file(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return f"(cannot be read: {error})"


def _describe_torch() -> dict[str, Any] | str:
    if importlib.util.find_spec("torch") is None:
        return "(not installed)"
    try:
        import torch  # heavy

        return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "devices": _describe_gpus(torch.cuda)}
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a torch that fails to load is a common reason for the report
        return f"(does not load: {type(error).__name__}: {error})"


def _describe_gpus(cuda: Any) -> list[str]:
    devices = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GB, compute {gpu.major}.{gpu.minor}" for gpu in devices]


def write_sysinfo(config: AppConfig, environ: Mapping[str, str]) -> Path:
    """Write `sysinfo-DATE.json` into the data folder and return its path."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    path = config.data_dir / f"sysinfo-{time.strftime('%Y-%m-%d-%H-%M-%S')}.json"
    path.write_text(json.dumps(collect_sysinfo(config, environ), indent=2, default=str) + "\n", encoding="utf-8")
    return path
