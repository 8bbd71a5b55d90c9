"""Which checkpoint files there are, what they are called, and which one a text means. Reads file headers at most; loads nothing.

`modules.sd_models` gives these their Forge names.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modules import hashes
from modules.errors import NoCheckpointError
from modules.hashes import HashStore

log = logging.getLogger(__name__)

CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
SHORT_HASH_DIGITS = 10
_MAX_HEADER_BYTES = 100_000_000
_TRAILING_HASH = re.compile(r"\s*\[[^\]]+\]\s*$")


def read_safetensors_metadata(path: Path) -> dict[str, Any]:
    """The `__metadata__` of a safetensors file, values that are JSON decoded; {} for other files and unreadable headers."""
    header = read_safetensors_header(path)
    metadata = header.get("__metadata__", {})
    return {key: _decoded(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file; {} when the file is none."""
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                return {}
            header = json.loads(file.read(header_bytes))
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _decoded(value: Any) -> Any:
    if not (isinstance(value, str) and value[:1] in ("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


class CheckpointInfo:
    """A checkpoint file and its names. `title` gains its hash when that is known."""

    def __init__(self, filename: str | Path, *, roots: Sequence[Path] | None = None, store: HashStore | None = None) -> None:
        path = Path(filename).absolute()
        roots, store = _installed_defaults(roots, store)
        self._store = store
        self.path = path
        self.filename = str(path)
        self.name = _name_under(path, roots)
        self.name_for_extra = path.stem
        self.model_name = Path(self.name).with_suffix("").as_posix().replace("/", "_").replace("\\", "_")
        self.is_safetensors = path.suffix.lower() == ".safetensors"
        self.hash = hashes.partial_hash(path)
        self.sha256 = store.known_sha256(path, f"checkpoint/{self.name}")
        self._metadata: dict[str, Any] | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says about itself; read once."""
        if self._metadata is None:
            self._metadata = read_safetensors_metadata(self.path)
        return self._metadata

    @property
    def shorthash(self) -> str | None:
        return self.sha256[:SHORT_HASH_DIGITS] if self.sha256 else None

    @property
    def title(self) -> str:
        return f"{self.name} [{self.shorthash}]" if self.shorthash else self.name

    @property
    def short_title(self) -> str:
        return f"{self.name_for_extra} [{self.shorthash}]" if self.shorthash else self.name_for_extra

    @property
    def ids(self) -> list[str]:
        """Every text that means exactly this file."""
        stem = Path(self.name).with_suffix("").as_posix()
        names = [self.title, self.short_title, self.name, Path(self.name).name, stem, self.name_for_extra, self.model_name, self.filename]
        known_hashes = [self.sha256, self.shorthash]
        if self.hash != hashes.HASH_OF_NOTHING:
            known_hashes += [self.hash, f"{self.name} [{self.hash}]", f"{self.name_for_extra} [{self.hash}]"]
        return list(dict.fromkeys(text for text in (*names, *known_hashes) if text))

    def calculate_shorthash(self) -> str | None:
        """Make the SHA256 known (None with --no-hashing); titles carry it from now on."""
        if self.sha256 is None:
            self.sha256 = self._store.sha256(self.path, f"checkpoint/{self.name}")
        return self.shorthash

    def register(self) -> None:
        """Add this file to the installed application's list."""
        from modules.application import current_application  # the application is built on this file

        current_application().checkpoints.add(self)

    def __repr__(self) -> str:
        return f"CheckpointInfo({self.title!r})"


def _installed_defaults(roots: Sequence[Path] | None, store: HashStore | None) -> tuple[Sequence[Path], HashStore]:
    if roots is not None and store is not None:
        return roots, store
    from modules.application import current_application  # the application is built on this file

    app = current_application()
    return (app.config.ckpt_dirs if roots is None else roots), (app.hashes if store is None else store)


def _name_under(path: Path, roots: Sequence[Path]) -> str:
    for root in roots:
        try:
            return path.relative_to(Path(root).absolute()).as_posix()
        except ValueError:
            continue
    return path.name


class CheckpointRegistry:
    """The checkpoints in the model folders, by title, in the order of their names. Thread-safe."""

    def __init__(self, roots: Sequence[Path], store: HashStore, *, extra_files: Iterable[Path] = ()) -> None:
        self.roots = tuple(roots)
        self.store = store
        self._extra_files = tuple(path for path in extra_files)
        self._lock = threading.RLock()
        self._infos: dict[Path, tuple[tuple[int, int], CheckpointInfo]] = {}

    def refresh(self) -> None:
        """Look at the folders again; what did not change keeps its entry."""
        with self._lock:
            old = self._infos
            self._infos = {}
            for path in (*self._extra_files, *(path for root in self.roots for path in find_checkpoint_files(root))):
                self._enter(path.absolute(), old)

    def _enter(self, path: Path, old: dict[Path, tuple[tuple[int, int], CheckpointInfo]]) -> None:
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            known = old.get(path)
            info = known[1] if known and known[0] == stamp else CheckpointInfo(path, roots=self.roots, store=self.store)
        except OSError as error:
            log.warning("Checkpoint %s cannot be read (%s); it is left out.", path, error)
            return
        self._infos[path] = (stamp, info)

    def add(self, info: CheckpointInfo) -> None:
        stat = info.path.stat()
        with self._lock:
            self._infos[info.path] = ((stat.st_mtime_ns, stat.st_size), info)

    def __iter__(self) -> Iterator[CheckpointInfo]:
        with self._lock:
            infos = [info for _, info in self._infos.values()]
        return iter(sorted(infos, key=lambda info: _natural_key(info.name)))

    def __len__(self) -> int:
        return len(self._infos)

    def titles(self, *, use_short: bool = False) -> list[str]:
        return [info.short_title if use_short else info.title for info in self]

    def find(self, text: str | None) -> CheckpointInfo | None:
        """The checkpoint that `text` means: a title, name, stem or hash; then a title with another hash; then a part of one title."""
        if not isinstance(text, str) or not text.strip():
            return None
        bare = _TRAILING_HASH.sub("", text).strip()
        return self._exact(text.strip()) or self._exact(bare) or self._containing(bare)

    def _exact(self, text: str) -> CheckpointInfo | None:
        if not text:
            return None
        return next((info for info in self if text in info.ids), None) or next(
            (info for info in self if text.lower() in (known.lower() for known in info.ids)), None
        )

    def _containing(self, text: str) -> CheckpointInfo | None:
        found = [info for info in self if text and text in info.title]
        return min(found, key=lambda info: len(info.title)) if found else None

    def first(self) -> CheckpointInfo:
        """The first checkpoint. Raises NoCheckpointError, which says where to put one."""
        for info in self:
            return info
        raise NoCheckpointError(no_checkpoint_message(self.roots))


def no_checkpoint_message(roots: Sequence[Path]) -> str:
    folders = " or ".join(str(root) for root in roots)
    kinds = ", ".join(CHECKPOINT_SUFFIXES)
    return f"There is no checkpoint to make a picture with. Put a Stable Diffusion file ({kinds}) into {folders}; no restart is needed."


def find_checkpoint_files(root: Path) -> list[Path]:
    """Checkpoint files under `root`, sub-folders included; VAE files kept beside them (`*.vae.*`) are left out."""
    found = find_files(root, CHECKPOINT_SUFFIXES)
    return [path for path in found if ".vae." not in path.name.lower()]


def find_files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files with one of the suffixes under `root`, by name. Linked folders are entered, each real folder once."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names if name.lower().endswith(tuple(suffixes))]
    return sorted(found, key=lambda path: _natural_key(path.as_posix()))


def _natural_key(text: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part.lower()) for part in re.split(r"(\d+)", text)]
