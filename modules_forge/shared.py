"""What ControlNet's extensions register and where their files lie: preprocessors, kinds of control model, folders.

Folders are those of `configure_folders`, which installing an application calls; none is made here. Must not know the page or any one model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_DEFAULT_MODELS_DIR = Path(__file__).resolve().parents[1] / "models"

_folders: dict[str, Path] = {
    "controlnet_dir": _DEFAULT_MODELS_DIR / "ControlNet",
    "preprocessor_dir": _DEFAULT_MODELS_DIR / "ControlNetPreprocessor",
    "diffusers_dir": _DEFAULT_MODELS_DIR / "diffusers",
}

supported_preprocessors: dict[str, Any] = {}
"""Name -> preprocessor."""
supported_control_models: list[Any] = []
"""Classes with `try_build_from_state_dict(state_dict, ckpt_path)`, asked in this order."""


def configure_folders(*, controlnet_dir: Path, preprocessor_dir: Path, diffusers_dir: Path) -> None:
    """Say where control models, preprocessor models and downloads of diffusers lie."""
    _folders.update(controlnet_dir=controlnet_dir, preprocessor_dir=preprocessor_dir, diffusers_dir=diffusers_dir)


def __getattr__(name: str) -> str:
    """`controlnet_dir, preprocessor_dir, diffusers_dir` as texts."""
    if name not in _folders:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return str(_folders[name])


def add_supported_preprocessor(preprocessor: Any) -> None:
    """Offer a preprocessor under its `name`; a later one of the same name takes its place."""
    supported_preprocessors[preprocessor.name] = preprocessor


def add_supported_control_model(control_model: Any) -> None:
    """Offer a kind of control model; kinds that are known already stay where they are."""
    if control_model not in supported_control_models:
        supported_control_models.append(control_model)


def try_load_supported_control_model(ckpt_path: str) -> Any:
    """The control model in the file, built by the first kind that knows it; None when none does. Raises what reading the file raises."""
    from backend.state_dict import read_state_dict  # imports torch

    state_dict = read_state_dict(Path(ckpt_path))
    for kind in supported_control_models:
        found = kind.try_build_from_state_dict(dict(state_dict), ckpt_path)
        if found is not None:
            return found
    return None
