"""VAE and text encoder files: which there are, and which ones a request means. Loads nothing.

Forge's page selects them with `forge_additional_modules`; in older requests `sd_vae` names one VAE.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.model_folders import find_files
from modules.errors import RequestError
from modules.jobs.context import required_context
from modules.nearest_names import say_nearest

log = logging.getLogger(__name__)

MODULE_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".sft")
NO_CHOICE = ("", "None", "Automatic", "Built in", "Built-in", "Use same choices")


class UnknownModuleError(RequestError):
    """The requested VAE or text encoder does not exist."""


class ModuleRegistry:
    """The files in the VAE and text encoder folders, by file name. Thread-safe."""

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
        """All files, VAE files first."""
        with self._lock:
            return {**self._vaes, **{name: path for name, path in self._text_encoders.items() if name not in self._vaes}}

    def find(self, text: str) -> Path:
        """The file meant by a file name, stem, relative path or full path; case matters only if two names differ by it alone.

        Rescans the folders if needed. Raises UnknownModuleError; files outside the folders are not accepted.
        """
        found = self._look_up(text)
        if found is None:
            self.refresh()
            found = self._look_up(text)
        if found is None:
            folders = " or ".join(str(root) for root in (*self.vae_roots, *self.text_encoder_roots))
            near = say_nearest(text, self.files)
            raise UnknownModuleError(f"VAE or text encoder {text[:200]!r} does not exist; {near}. Put the file into {folders}, or choose another.")
        return found

    def _look_up(self, text: str) -> Path | None:
        files, wanted = self.files, text.strip().replace("\\", "/")
        roots = [Path(root).absolute() for root in (*self.vae_roots, *self.text_encoder_roots)]
        names = [(path, [name, path.stem, *_ways_below(path, roots)]) for name, path in files.items()]
        for asked, lower in ((text, False), (wanted, False), (wanted.lower(), True)):
            for path, known in names:
                if asked in ([one.lower() for one in known] if lower else known):
                    return path
        return next((path for path in files.values() if Path(text).is_absolute() and _same_file(Path(text), path)), None)

    def chosen_by(self, options: Mapping[str, Any]) -> tuple[Path, ...]:
        """The files named by `forge_additional_modules` and `sd_vae`. Raises UnknownModuleError."""
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


def _ways_below(path: Path, roots: Sequence[Path]) -> list[str]:
    """The file's path relative to each folder that contains it, with and without suffix."""
    below = [path.relative_to(root) for root in roots if path.is_relative_to(root)]
    return [text for one in below for text in (one.as_posix(), one.with_suffix("").as_posix())]


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return False


# Names that extensions use; they use the installed application's registry.


def _installed() -> ModuleRegistry:
    return required_context().additional_modules


def refresh_vae_list() -> None:
    _installed().refresh()


def get_filename(filepath: str) -> str:
    return Path(filepath).name


def reload_vae_weights(sd_model: Any = None, vae_file: Any = "") -> Any:
    """The current checkpoint with the VAE of a file, which the setting `sd_vae` names from then on; without a file, with the VAE that the settings
    name. Returns the model. Raises UnknownModuleError."""
    app = required_context()
    if vae_file is None or str(vae_file) not in NO_CHOICE:
        app.options.set("sd_vae", "None" if vae_file is None else _installed().find(str(vae_file)).name)
    return app.models.ensure_loaded()


def __getattr__(name: str) -> Any:
    """`vae_dict`: file name -> path of the VAE files."""
    if name == "vae_dict":
        return {file_name: str(path) for file_name, path in _installed().vaes.items()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
