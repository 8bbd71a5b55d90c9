"""LoRA files: which there are, what they are called, and which one a name in a prompt means. Reads file headers at most; loads nothing."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.checkpoints import find_files, read_safetensors_metadata
from modules.hashes import HashStore

log = logging.getLogger(__name__)

LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt")
SHORT_HASH_DIGITS = 12
NO_NAMES = frozenset({"none", "addams"})
"""What is never an alias: the first means no network in settings, the second many trainers leave in their files."""
_LEFT_OUT_OF_METADATA = ("ssmd_cover_images",)


class LoraOnDisk:
    """A LoRA file and its names."""

    def __init__(self, path: Path, store: HashStore) -> None:
        self._store = store
        self.path = path
        self.filename = str(path)
        self.name = path.stem
        self.is_safetensors = path.suffix.lower() == ".safetensors"
        self.stamp = _stamp(path)
        metadata = read_safetensors_metadata(path)
        self.metadata: dict[str, Any] = {key: value for key, value in metadata.items() if key not in _LEFT_OUT_OF_METADATA}

    @property
    def alias(self) -> str:
        """The name its trainer gave it, or the file's."""
        return str(self.metadata.get("ss_output_name") or self.name)

    @property
    def hash(self) -> str:
        """The hash of its tensors that trainers write and infotexts carry; made when first asked for, "" with --no-hashing."""
        make = self._store.addnet_sha256 if self.is_safetensors else self._store.sha256
        return self._written_hash() or make(self.path, self._hash_title) or ""

    @property
    def known_hash(self) -> str | None:
        """The same where it need not be made."""
        known = self._store.known_addnet_sha256 if self.is_safetensors else self._store.known_sha256
        return self._written_hash() or known(self.path, self._hash_title)

    def _written_hash(self) -> str | None:
        written = self.metadata.get("sshs_model_hash")
        return written if isinstance(written, str) and written else None

    @property
    def _hash_title(self) -> str:
        return f"lora/{self.name}"

    @property
    def shorthash(self) -> str:
        return self.hash[:SHORT_HASH_DIGITS]

    def __repr__(self) -> str:
        return f"LoraOnDisk({self.filename!r})"


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


class LoraRegistry:
    """The LoRA files in the folders, by stem, in the order of their names. The folders are looked at when somebody asks first. Thread-safe."""

    def __init__(self, roots: Sequence[Path], store: HashStore) -> None:
        self.roots = tuple(roots)
        self._store = store
        self._lock = threading.RLock()
        self._was_read = False
        self._by_path: dict[Path, LoraOnDisk] = {}
        self._by_name: dict[str, LoraOnDisk] = {}

    def refresh(self) -> None:
        """Look at the folders again; what did not change keeps its entry. Of files with one stem the first counts under it."""
        with self._lock:
            self._was_read = True
            old, self._by_path, self._by_name = self._by_path, {}, {}
            for root in self.roots:
                for path in find_files(root, LORA_SUFFIXES):
                    self._enter(path.absolute(), root, old)

    def _enter(self, path: Path, root: Path, old: Mapping[Path, LoraOnDisk]) -> None:
        try:
            known = old.get(path)
            entry = known if known is not None and known.stamp == _stamp(path) else LoraOnDisk(path, self._store)
        except OSError as error:
            log.warning("LoRA %s cannot be read (%s); it is left out.", path, error)
            return
        self._by_path[path] = entry
        if (first := self._by_name.setdefault(entry.name, entry)) is not entry:
            below = path.relative_to(Path(root).absolute()).with_suffix("").as_posix()
            log.warning("Two LoRA files are called %s: %s is meant by it, %s by %s.", entry.name, first.path, path, below)

    def __iter__(self) -> Iterator[LoraOnDisk]:
        with self._lock:
            if not self._was_read:
                self.refresh()
            return iter(list(self._by_name.values()))

    def list_names(self) -> list[str]:
        """Stems of the files that are there now; opens none."""
        return list(dict.fromkeys(path.stem for root in self.roots for path in find_files(root, LORA_SUFFIXES)))

    def find(self, name: str) -> LoraOnDisk | None:
        """The file that a name in a prompt means: a stem, an alias that one file alone has, a path below the folder; letter case counts only
        where two differ by it. A file that is new, changed or gone is noticed without a refresh.
        """
        with self._lock:
            found = self._look_up(name)
            if found is None or not found.path.is_file() or found.stamp != _stamp(found.path):
                self.refresh()
                found = self._look_up(name)
        return found

    def find_by_hash(self, shorthash: str) -> LoraOnDisk | None:
        """The file whose hash begins so, of those whose hash is known without reading them."""
        return next((entry for entry in self if len(shorthash) >= SHORT_HASH_DIGITS and (entry.known_hash or "").startswith(shorthash)), None)

    def _look_up(self, name: str) -> LoraOnDisk | None:
        names = self._names()
        wanted = name.strip()
        return names.get(wanted) or {key.lower(): entry for key, entry in reversed(names.items())}.get(wanted.lower())

    def _names(self) -> dict[str, LoraOnDisk]:
        """Every text that means a file; stems come before aliases, aliases before paths."""
        entries = list(self._by_path.values())
        counts = Counter(entry.alias for entry in entries)
        names = dict(self._by_name)
        for entry in entries:
            if counts[entry.alias] == 1 and entry.alias.lower() not in NO_NAMES:
                names.setdefault(entry.alias, entry)
        for entry in entries:
            for below in self._paths_below(entry):
                names.setdefault(below, entry)
        return names

    def _paths_below(self, entry: LoraOnDisk) -> list[str]:
        roots = [Path(root).absolute() for root in self.roots]
        return [entry.path.relative_to(root).with_suffix("").as_posix() for root in roots if entry.path.is_relative_to(root)]
