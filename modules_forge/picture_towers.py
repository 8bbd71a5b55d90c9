"""Where image encoders are found: the files of the folders they may lie in, what was read of their heads, and the one that stays in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from backend.checkpoint_file import CheckpointError, TensorFile, open_tensor_file
from backend.model_folders import find_files
from modules_forge import shared

logger = logging.getLogger(__name__)

T = TypeVar("T")
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
_PICKLE_WORDS = ("clip", "vit", "encoder")
"""Words in file names that make a pickled file worth opening, which takes long."""


def tower_files() -> Iterator[Path]:
    """Files that may be image encoders."""
    for folder in (Path(shared.preprocessor_dir), Path(shared.controlnet_dir), Path(shared.controlnet_dir).parent / "clip_vision"):
        for path in find_files(folder, _ENDINGS):
            if path.suffix.lower() == ".safetensors" or any(word in path.name.lower() for word in _PICKLE_WORDS):
                yield path


class WidthReader(Generic[T]):
    """Reads something of each file's head once: `read(file)`, None for a file of another kind."""

    def __init__(self, read: Callable[[TensorFile], T | None]) -> None:
        self._read = read
        self._known: dict[tuple[str, int, int], T | None] = {}

    def of(self, path: Path) -> T | None:
        """None if the file is something else or cannot be read."""
        stat = path.stat()
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        if key not in self._known:
            try:
                with open_tensor_file(path) as file:
                    self._known[key] = self._read(file)
            except CheckpointError as error:
                logger.debug("%s was skipped in the search for an image encoder: %s", path.name, error)
                self._known[key] = None
        return self._known[key]


class KeptTower(Generic[T]):
    """The image encoder that was used last."""

    def __init__(self) -> None:
        self._kept: dict[str, T] = {}

    def get(self, path: Path, load: Callable[[Path], T]) -> T:
        """The encoder in a file. Raises: what `load` raises."""
        if str(path) not in self._kept:
            self._kept.clear()
            self._kept[str(path)] = load(path)
        return self._kept[str(path)]
