"""VAE and text encoder files: which there are, and which ones a request means. Loads nothing.

Forge's page chooses them by `forge_additional_modules`; `sd_vae` of older requests names one VAE.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.checkpoints import find_files
from modules.errors import RequestError

log = logging.getLogger(__name__)

MODULE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")
NO_CHOICE = ("", "None", "Automatic", "Built in", "Use same choices")


class UnknownModuleError(RequestError):
    """A VAE or text encoder was asked for that no file answers to."""


class ModuleRegistry:
    """The files of the VAE and text encoder folders, by file name. Thread-safe."""

    def __init__(self, vae_roots: Sequence[Path], text_encoder_roots: Sequence[Path]) -> None:
        self.vae_roots = tuple(vae_roots)
        self.text_encoder_roots = tuple(text_encoder_roots)
        self._lock = threading.RLock()
        self._vaes: dict[str, Path] = {}
        self._text_encoders: dict[str, Path] = {}

    def refresh(self) -> None:
        with self._lock:
            self._vaes = _by_name(self.vae_roots)
            self._text_encoders = _by_name(self.text_encoder_roots)

    @property
    def vaes(self) -> Mapping[str, Path]:
        return self._vaes

    @property
    def files(self) -> dict[str, Path]:
        """All of them, VAE files first."""
        with self._lock:
            return {**self._vaes, **{name: path for name, path in self._text_encoders.items() if name not in self._vaes}}

    def find(self, text: str) -> Path:
        """The file that a file name, stem or full path means. Raises UnknownModuleError; files outside the folders are not taken."""
        wanted = Path(text)
        for name, path in self.files.items():
            if text in (name, path.stem) or (wanted.is_absolute() and _same_file(wanted, path)):
                return path
        folders = " or ".join(str(root) for root in (*self.vae_roots, *self.text_encoder_roots))
        raise UnknownModuleError(f"VAE or text encoder {text!r} was asked for; no such file is in {folders}. Put it there, or choose another.")

    def chosen_by(self, options: Mapping[str, Any]) -> tuple[Path, ...]:
        """The files that `forge_additional_modules` and `sd_vae` name. Raises UnknownModuleError."""
        names = [str(name) for name in options.get("forge_additional_modules") or []]
        if (vae := options.get("sd_vae")) and vae not in NO_CHOICE:
            names.append(str(vae))
        chosen = [name for name in names if name not in NO_CHOICE]
        return tuple(dict.fromkeys(self.find(name) for name in chosen)) if chosen else ()


def _by_name(roots: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for root in roots:
        for path in find_files(root, MODULE_SUFFIXES):
            found.setdefault(path.name, path.absolute())
    return found


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


# The names that extensions use; they speak to the installed application's registry.


def _installed() -> ModuleRegistry:
    from modules.application import current_application  # the application is built on this file

    return current_application().additional_modules


def refresh_vae_list() -> None:
    _installed().refresh()


def get_filename(filepath: str) -> str:
    return Path(filepath).name


def __getattr__(name: str) -> Any:
    """`vae_dict`: file name -> path of the VAE files."""
    if name == "vae_dict":
        return {file_name: str(path) for file_name, path in _installed().vaes.items()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
