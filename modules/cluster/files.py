"""Model files on a worker: those of its own folders, and those that the front sent, kept by hash. Knows no models and no Ray.

A file is sent in parts into `SHA256.part`; a transfer that broke off goes on where it ended. It gets its name only when its hash is right, so a
half or damaged file is never loaded.

    folder / kind / SHA256 / name.safetensors
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.cluster.fleet import WorkerRefusesError
from modules.cluster.orders import FileName

log = logging.getLogger(__name__)

PART_BYTES = 4 << 20
_SPARE_BYTES = 1 << 30
"""Disk that stays free on a worker: pictures of a running job and the system need some."""
_BLOCK_BYTES = 1 << 20


class FileCache:
    """Files sent by the front, in `folder`; `own_dirs` are the worker's folders by kind. Thread-safe."""

    def __init__(self, folder: Path, own_dirs: Mapping[str, Sequence[Path]], *, spare_bytes: int = _SPARE_BYTES) -> None:
        self.folder = folder
        self._own_dirs = own_dirs
        self._spare_bytes = spare_bytes
        self._lock = threading.Lock()

    def locate(self, file: FileName) -> Path | None:
        """Where the file is: sent by the front, else one of the same name and size in a folder of this machine."""
        if file.sha256 is not None and (sent := self._place(file)).is_file():
            return sent
        return next((path for path in self._own_of_name(file) if path.stat().st_size == file.size_bytes), None)

    def check_no_other(self, file: FileName) -> None:
        """Raises WorkerRefusesError if another file of this name would be taken for it: networks are found by their name alone."""
        for path in self._own_of_name(file):
            if path.stat().st_size != file.size_bytes:
                raise WorkerRefusesError(
                    f"it has another {file.name} ({path.stat().st_size} bytes instead of {file.size_bytes}); remove one of them."
                )

    def missing(self, files: Sequence[FileName]) -> list[dict[str, Any]]:
        """The files that must be sent, with the bytes that are here already. Raises WorkerRefusesError if one cannot be sent."""
        found = []
        for file in files:
            if file.kind == "network":
                self.check_no_other(file)
            if self.locate(file) is not None:
                continue
            if file.sha256 is None:
                raise WorkerRefusesError(f"it has no {file.kind} {file.name}, and the front computes no hashes (--no-hashing) to send it by.")
            found.append({"sha256": file.sha256, "have_bytes": self._have_bytes(file)})
        return found

    def write_part(self, file: FileName, offset: int, data: bytes) -> dict[str, Any]:
        """Write a part that starts at `offset`. {"have_bytes": n} tells where to go on, {"is_whole": True} that the file is there.

        Raises WorkerRefusesError: disk full, or the whole file has another hash (it is then sent from its start).
        """
        if file.sha256 is None or len(data) > PART_BYTES:
            raise WorkerRefusesError(f"a part of {len(data)} bytes of {file.name} cannot be taken.")
        with self._lock:
            have_bytes = self._have_bytes(file)
            if not self._place(file).is_file() and offset <= have_bytes and offset + len(data) <= file.size_bytes:
                self._write(file, offset, data)
                have_bytes = self._have_bytes(file)
                if have_bytes == file.size_bytes:
                    self._finish(file)
            is_whole = self._place(file).is_file()
            return {"is_whole": is_whole, "have_bytes": file.size_bytes if is_whole else self._have_bytes(file)}

    def _write(self, file: FileName, offset: int, data: bytes) -> None:
        """Another worker of this machine may write the same file: the same bytes at the same place do no harm."""
        part = self._part(file)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(part.parent).free - len(data) < self._spare_bytes:
                raise OSError(f"less than {self._spare_bytes / 2**30:.1f} GiB would stay free")
            if offset == 0:
                part.touch()
            with part.open("r+b") as stream:
                stream.seek(offset)
                stream.write(data)
        except FileNotFoundError:
            log.debug("%s was finished by another worker.", part)
        except OSError as error:
            raise WorkerRefusesError(f"its disk cannot take {file.name}: {error}.") from error

    def _finish(self, file: FileName) -> None:
        part, place = self._part(file), self._place(file)
        try:
            found = _sha256(part)
            if found != file.sha256:
                part.unlink()
                raise WorkerRefusesError(f"{file.name} arrived damaged (SHA256 {found[:10]} instead of {str(file.sha256)[:10]}) and was removed.")
            place.parent.mkdir(parents=True, exist_ok=True)
            part.replace(place)
        except FileNotFoundError:
            log.debug("%s was finished by another worker.", part)
            return
        log.info("Received %s (%.1f MB).", file.name, file.size_bytes / 1e6)

    def _have_bytes(self, file: FileName) -> int:
        try:
            return self._part(file).stat().st_size
        except FileNotFoundError:  # nothing has come yet, or another worker of this machine has just finished it
            return 0

    def _place(self, file: FileName) -> Path:
        return self.folder / file.kind / str(file.sha256) / file.name

    def _part(self, file: FileName) -> Path:
        return self.folder / "parts" / f"{file.sha256}.part"

    def _own_of_name(self, file: FileName) -> Iterator[Path]:
        for folder in self._own_dirs.get(file.kind, ()):
            yield from (path for path in folder.rglob(_literal(file.name)) if path.is_file() and self.folder not in path.parents)


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_part(path: Path, offset: int) -> bytes:
    """The part of a file that begins at byte `offset`; empty at its end."""
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(PART_BYTES)
