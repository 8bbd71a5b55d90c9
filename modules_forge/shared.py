"""What ControlNet extensions register, and their folders: preprocessors, kinds of control models, folders.

`configure_folders` sets the folders when an application is installed; none is created here. Must not know the page or any particular model.
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
"""Classes with `try_build_from_state_dict(state_dict, ckpt_path)`, tried in this order."""


def configure_folders(*, controlnet_dir: Path, preprocessor_dir: Path, diffusers_dir: Path) -> None:
    """Set the folders of control models, preprocessor models and diffusers downloads."""
    _folders.update(controlnet_dir=controlnet_dir, preprocessor_dir=preprocessor_dir, diffusers_dir=diffusers_dir)


def __getattr__(name: str) -> str:
    """`controlnet_dir, preprocessor_dir, diffusers_dir` as strings."""
    if name not in _folders:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return str(_folders[name])


def add_supported_preprocessor(preprocessor: Any) -> None:
    """Register a preprocessor under its `name`, replacing one with the same name."""
    supported_preprocessors[preprocessor.name] = preprocessor


def add_supported_control_model(control_model: Any) -> None:
    """Register a kind of control model; kinds already known keep their position."""
    if control_model not in supported_control_models:
        supported_control_models.append(control_model)


def try_load_supported_control_model(ckpt_path: str) -> Any:
    """The control model in the file, built by the first kind that recognizes it; None if none does. Raises what reading the file raises."""
    from backend.state_dict import read_state_dict  # imports torch

    state_dict = read_state_dict(Path(ckpt_path))
    for kind in supported_control_models:
        found = kind.try_build_from_state_dict(dict(state_dict), ckpt_path)
        if found is not None:
            return found
    return None
