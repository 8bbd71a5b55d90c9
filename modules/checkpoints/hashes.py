"""SHA256 of model files, cached by path, time and size, and the older partial hash. Knows no models."""

from __future__ import annotations

import hashlib
import logging
import os
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from modules.checkpoints.cache import FileCache
from modules.jobs.context import required_context

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
PARTIAL_OFFSET_BYTES = 0x100000
PARTIAL_LENGTH_BYTES = 0x10000
_NOTHING = hashlib.sha256(b"").hexdigest()
HASHES_OF_NOTHING = frozenset({"NOFILE", *(_NOTHING[:digits] for digits in range(8, len(_NOTHING) + 1))})
"""The SHA256 of an empty file, and the partial hash of every file too short for one: they do not identify a file."""


def _hash_rest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def calculate_sha256(filename: str | PathLike[str]) -> str:
    """SHA256 of the whole file, hexadecimal."""
    with open(filename, "rb") as file:
        return _hash_rest(file)


def addnet_hash_safetensors(file: BinaryIO) -> str:
    """SHA256 of only the tensors of a safetensors file, independent of metadata (as kohya's tools write it into LoRA files)."""
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    header_bytes = int.from_bytes(file.read(8), "little")
    file.seek(min(header_bytes + 8, file_bytes))  # a damaged file may contain any number
    return _hash_rest(file)


def partial_hash(filename: str | PathLike[str]) -> str:
    """The 8-digit hash of old infotexts: SHA256 of 64 KiB at 1 MiB. 'NOFILE' if the file is gone."""
    try:
        with open(filename, "rb") as file:
            file.seek(PARTIAL_OFFSET_BYTES)
            return hashlib.sha256(file.read(PARTIAL_LENGTH_BYTES)).hexdigest()[:8]
    except FileNotFoundError:
        return "NOFILE"


class HashStore:
    """Hashes of files by title. If not `enabled` (--no-hashing), computes nothing and ignores cached hashes.

    An empty file has no hash, because it would share it with every other empty file.
    """

    def __init__(self, cache: FileCache, *, enabled: bool = True) -> None:
        self.cache = cache
        self.enabled = enabled

    def known_sha256(self, path: Path, title: str) -> str | None:
        """The cached hash, if the file is unchanged."""
        return _telling(self.cache.peek("hashes", title, path)) if self.enabled and path.is_file() else None

    def sha256(self, path: Path, title: str) -> str | None:
        """The hash, computed once; None with --no-hashing."""
        if not self.enabled:
            return None
        if (known := self.known_sha256(path, title)) is None:
            log.info("Calculating SHA256 of %s.", path.name)
        return known or self.cache.for_file("hashes", title, path, lambda: _telling(calculate_sha256(path)))

    def known_addnet_sha256(self, path: Path, title: str) -> str | None:
        """The cached hash of a file's tensors, if the file is unchanged."""
        return _telling(self.cache.peek("hashes-addnet", title, path)) if self.enabled and path.is_file() else None

    def addnet_sha256(self, path: Path, title: str) -> str | None:
        if not self.enabled:
            return None

        def make() -> str | None:
            with path.open("rb") as file:
                return _telling(addnet_hash_safetensors(file))

        return _telling(self.cache.for_file("hashes-addnet", title, path, make))


def _telling(value: object) -> str | None:
    """A hash that identifies a file; None for the hash of empty data and for anything invalid from a damaged cache."""
    return value if isinstance(value, str) and value and value not in HASHES_OF_NOTHING else None


# Names that extensions call; they use the installed application's store.


def _installed() -> HashStore:
    return required_context().hashes


def sha256_from_cache(filename: str | PathLike[str], title: str, use_addnet_hash: bool = False) -> str | None:
    store = _installed()
    return store.cache.peek("hashes-addnet", title, Path(filename)) if use_addnet_hash else store.known_sha256(Path(filename), title)


def sha256(filename: str | PathLike[str], title: str, use_addnet_hash: bool = False) -> str | None:
    store = _installed()
    return store.addnet_sha256(Path(filename), title) if use_addnet_hash else store.sha256(Path(filename), title)
