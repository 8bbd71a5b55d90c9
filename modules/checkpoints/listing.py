"""Which checkpoint files there are, their names, and which one a text means. Reads at most file headers; loads nothing.

`modules.checkpoints.models` exposes these under Forge's names.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from backend.foreign_json import MAX_BYTES, ForeignJsonError, open_file, parse_json
from backend.model_folders import find_files, natural_key, say_once
from modules.checkpoints import hashes
from modules.checkpoints.hashes import HashStore
from modules.errors import NoCheckpointError, UnknownCheckpointError
from modules.jobs.context import required_context
from modules.nearest_names import say_nearest

log = logging.getLogger(__name__)

CHECKPOINT_SUFFIXES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth")
SHORT_HASH_DIGITS = 10
_HASH = re.compile("[0-9a-fA-F]{8,64}")


def read_safetensors_metadata(path: Path) -> dict[str, Any]:
    """The `__metadata__` of a safetensors file with JSON values decoded; {} for other files and unreadable headers."""
    header = read_safetensors_header(path)
    metadata = header.get("__metadata__", {})
    return {key: _decoded(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file; {} if it is not one."""
    if path.suffix.lower() != ".safetensors":
        return {}
    try:
        with open_file(path) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(header_bytes)) if 2 <= header_bytes <= MAX_BYTES else None
    except (OSError, ForeignJsonError) as error:
        say_once(f"{path}: its header cannot be read ({error}); its metadata is unknown.")
        return {}
    return header if isinstance(header, dict) else {}


def _decoded(value: Any) -> Any:
    if not (isinstance(value, str) and value[:1] in ("{", "[")):
        return value
    try:
        return parse_json(value)
    except ForeignJsonError:
        return value


class CheckpointInfo:
    """A checkpoint file and its names. `title` includes the hash once that is known."""

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
        """The file's metadata; read once."""
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
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Texts that mean this file, most specific first: titles and path, relative path, bare name."""
        below, alone = self.name, Path(self.name).name
        titles = [self.filename, *([self.title, self.short_title] if self.shorthash else [])]
        if self.hash not in hashes.HASHES_OF_NOTHING:
            titles += [f"{self.name} [{self.hash}]", f"{self.name_for_extra} [{self.hash}]"]
        return (*titles,), (below, Path(below).with_suffix("").as_posix(), self.model_name), (alone, self.name_for_extra)

    @property
    def known_hashes(self) -> tuple[str, ...]:
        """The SHA256 if known, and the old partial hash. A file too short for the latter has none, because many files would share it."""
        return tuple(one for one in (self.sha256, self.hash) if one and one not in hashes.HASHES_OF_NOTHING)

    @property
    def ids(self) -> list[str]:
        """All texts that mean exactly this file."""
        short = [self.shorthash] if self.shorthash else []
        return list(dict.fromkeys(text for text in (*(one for rank in self.names for one in rank), *self.known_hashes, *short) if text))

    def calculate_shorthash(self) -> str | None:
        """Compute the SHA256 (None with --no-hashing); titles include it from now on."""
        if self.sha256 is None:
            self.sha256 = self._store.sha256(self.path, f"checkpoint/{self.name}")
        return self.shorthash

    def register(self) -> None:
        """Add this file to the installed application's list."""
        required_context().checkpoints.add(self)

    def __repr__(self) -> str:
        return f"CheckpointInfo({self.title!r})"


def _installed_defaults(roots: Sequence[Path] | None, store: HashStore | None) -> tuple[Sequence[Path], HashStore]:
    if roots is not None and store is not None:
        return roots, store
    app = required_context()
    return (app.config.ckpt_dirs if roots is None else roots), (app.hashes if store is None else store)


def _name_under(path: Path, roots: Sequence[Path]) -> str:
    for root in roots:
        try:
            return path.relative_to(Path(root).absolute()).as_posix()
        except ValueError:
            continue
    return path.name


class CheckpointRegistry:
    """The checkpoints in the model folders by title, sorted by name. Thread-safe."""

    def __init__(self, roots: Sequence[Path], store: HashStore, *, extra_files: Iterable[Path] = (), demo_files: Iterable[Path] = ()) -> None:
        """`demo_files` are listed only while there is no other checkpoint."""
        self.roots = tuple(roots)
        self.store = store
        self._extra_files = tuple(extra_files)
        self._demo_files = tuple(demo_files)
        self._lock = threading.RLock()
        self._infos: dict[Path, tuple[tuple[int, int], CheckpointInfo]] = {}

    def refresh(self) -> None:
        """Scan the folders again; unchanged files keep their entries."""
        with self._lock:
            old = self._infos
            self._infos = {}
            for path in (*self._extra_files, *(path for root in self.roots for path in find_checkpoint_files(root))):
                self._enter(path.absolute(), old)
            for path in self._demo_files if not self._infos else ():
                self._enter(path.absolute(), old)

    def _enter(self, path: Path, old: dict[Path, tuple[tuple[int, int], CheckpointInfo]]) -> None:
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            known = old.get(path)
            info = known[1] if known and known[0] == stamp else CheckpointInfo(path, roots=self.roots, store=self.store)
        except OSError as error:
            log.warning("Checkpoint %s cannot be read (%s); it is ignored.", path, error)
            return
        self._infos[path] = (stamp, info)

    def add(self, info: CheckpointInfo) -> None:
        stat = info.path.stat()
        with self._lock:
            self._infos[info.path] = ((stat.st_mtime_ns, stat.st_size), info)

    def __iter__(self) -> Iterator[CheckpointInfo]:
        with self._lock:
            infos = [info for _, info in self._infos.values()]
        return iter(sorted(infos, key=lambda info: natural_key(info.name)))

    def __len__(self) -> int:
        return len(self._infos)

    def titles(self, *, use_short: bool = False) -> list[str]:
        return [info.short_title if use_short else info.title for info in self]

    def find(self, text: str | None) -> CheckpointInfo | None:
        """The checkpoint that `text` means: a title, path, name or stem in any case; a hash of 8 or more digits; a name with a hash.

        Names win over hashes: "b3" is the file b3, not a file whose hash contains b3. Windows paths relative to the folder work too.
        For a name with a hash in brackets, the hash decides if a file has it, otherwise the name.
        """
        if not isinstance(text, str) or not text.strip():
            return None
        infos = list(self)
        for wanted in dict.fromkeys((text.strip(), text.strip().replace("\\", "/"))):
            name, bracket, rest = wanted.rpartition("[")
            given_hash = rest.rstrip("]").strip() if bracket else ""
            found = _by_name(infos, wanted) or _by_hash(infos, wanted) or _by_hash(infos, given_hash)
            if found is None and bracket and rest.endswith("]"):
                found = _by_name(infos, name.strip())
            if found is not None:
                return found
        return None

    def require(self, text: object) -> CheckpointInfo:
        """The checkpoint that `text` means; rescans the folders if needed. Raises UnknownCheckpointError, NoCheckpointError."""
        wanted = text if isinstance(text, str) else None
        if (found := self.find(wanted)) is None:
            self.refresh()
            found = self.find(wanted)
        if found is None:
            raise UnknownCheckpointError(self.explain_missing(text))
        return found

    def explain_missing(self, text: object) -> str:
        """Names the requested checkpoint and the nearest matches. Raises NoCheckpointError if there is no checkpoint at all."""
        self.first()
        return f"checkpoint {str(text)[:200]!r} does not exist; {say_nearest(text, self.titles())}. Put the file into {self.roots[0]}."

    def first(self) -> CheckpointInfo:
        """The first checkpoint. Raises NoCheckpointError, which says where to put one."""
        for info in self:
            return info
        raise NoCheckpointError(no_checkpoint_message(self.roots))


def no_checkpoint_message(roots: Sequence[Path]) -> str:
    folders = " or ".join(str(root) for root in roots)
    kinds = ", ".join(CHECKPOINT_SUFFIXES)
    return f"There is no checkpoint yet. Put a Stable Diffusion file ({kinds}) into {folders}; no restart is needed."


def find_checkpoint_files(root: Path) -> list[Path]:
    """Checkpoint files under `root`, including subfolders; VAE files next to them (`*.vae.*`) are excluded."""
    found = find_files(root, CHECKPOINT_SUFFIXES)
    return [path for path in found if ".vae." not in path.name.lower()]


def _by_name(infos: Iterable[CheckpointInfo], text: str) -> CheckpointInfo | None:
    ways: tuple[Callable[[str], str], ...] = (str, str.lower)
    for write in ways:
        for rank in range(3):
            if (found := next((info for info in infos if write(text) in map(write, info.names[rank])), None)) is not None:
                return found
    return None


def _by_hash(infos: Iterable[CheckpointInfo], text: str) -> CheckpointInfo | None:
    if _HASH.fullmatch(text) is None:
        return None
    return next((info for info in infos if any(known.startswith(text.lower()) for known in info.known_hashes)), None)
