"""The LoRA files in the folders and those in use: listing, lookup by name, and applying them to networks.

Under the names that extensions import. `set_up` sets the folders; this extension's script calls it on load.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from network import SHORT_HASH_DIGITS, Network, NetworkOnDisk, stamp_of

from backend.model_folders import find_files
from modules.hashes import HashStore

if TYPE_CHECKING:
    from backend.patcher.lora_files import LoraPatchSet

log = logging.getLogger(__name__)

LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt")
forbidden_network_aliases = {"none": 1, "addams": 1}
"""Names that are never an alias: the first means "no network" in settings, the second is a placeholder many trainers leave."""
loaded_networks: list[Network] = []
"""The LoRAs of the current or last job."""


class LoraRegistry:
    """The LoRA files in the folders by stem, sorted by name. Scans the folders on first use. Thread-safe."""

    def __init__(self, roots: Sequence[Path], store: HashStore) -> None:
        self.roots = tuple(roots)
        self._store = store
        self._lock = threading.RLock()
        self._was_read = False
        self._by_path: dict[Path, NetworkOnDisk] = {}
        self._by_name: dict[str, NetworkOnDisk] = {}

    def refresh(self) -> None:
        """Scan the folders again; unchanged files keep their entries. Of files with the same stem, the first gets it."""
        with self._lock:
            self._was_read = True
            old, self._by_path, self._by_name = self._by_path, {}, {}
            for root in self.roots:
                for path in find_files(root, LORA_SUFFIXES):
                    self._enter(path.absolute(), root, old)

    def _enter(self, path: Path, root: Path, old: Mapping[Path, NetworkOnDisk]) -> None:
        try:
            known = old.get(path)
            entry = known if known is not None and known.stamp == stamp_of(path) else NetworkOnDisk(path, self._store)
        except OSError as error:
            log.warning("LoRA %s cannot be read (%s); it is ignored.", path, error)
            return
        self._by_path[path] = entry
        if (first := self._by_name.setdefault(entry.name, entry)) is not entry:
            below = path.relative_to(Path(root).absolute()).with_suffix("").as_posix()
            log.warning("Two LoRA files are named %s: the name means %s; use the path for %s: %s.", entry.name, first.path, path, below)

    def by_name(self) -> dict[str, NetworkOnDisk]:
        """All files by stem."""
        with self._lock:
            if not self._was_read:
                self.refresh()
            return dict(self._by_name)

    def __iter__(self) -> Iterator[NetworkOnDisk]:
        return iter(self.by_name().values())

    def list_names(self) -> list[str]:
        """Stems of the current files; opens none."""
        return list(dict.fromkeys(path.stem for root in self.roots for path in find_files(root, LORA_SUFFIXES)))

    def find(self, name: str) -> NetworkOnDisk | None:
        """The file meant by a name in a prompt: a stem, a unique alias, or a relative path; case matters only if two names differ by it alone.
        Notices new, changed and deleted files without a refresh.
        """
        return self.find_all([name])[0]

    def find_all(self, names: Sequence[str]) -> list[NetworkOnDisk | None]:
        """As `find`, for many names: the folders are looked at once more at most, however many are not there."""
        with self._lock:
            found = self._look_up_all(names)
            if any(entry is None or not entry.path.is_file() or entry.stamp != stamp_of(entry.path) for entry in dict.fromkeys(found)):
                self.refresh()
                found = self._look_up_all(names)
        return found

    def find_by_hash(self, shorthash: str) -> NetworkOnDisk | None:
        """The file whose hash starts with `shorthash`, among those with known hashes."""
        if len(shorthash) < SHORT_HASH_DIGITS:
            return None
        return next((entry for entry in self if (entry.known_hash or "").startswith(shorthash.lower())), None)

    def _look_up_all(self, names: Sequence[str]) -> list[NetworkOnDisk | None]:
        known = self.names()
        in_any_case = {key.lower(): entry for key, entry in reversed(known.items())}

        def look_up(wanted: str) -> NetworkOnDisk | None:
            if wanted not in known:  # a Windows path below the folder; an ending that a client wrote along
                wanted = wanted.replace("\\", "/")
                ending = next((one for one in LORA_SUFFIXES if wanted.lower().endswith(one)), "")
                wanted = wanted[: len(wanted) - len(ending)]
            return known.get(wanted) or in_any_case.get(wanted.lower())

        return [look_up(name.strip()) for name in names]

    def names(self) -> dict[str, NetworkOnDisk]:
        """All texts that mean a file; stems take precedence over aliases, aliases over paths."""
        entries = list(self._by_path.values())
        counts = Counter(entry.alias for entry in entries)
        names = dict(self._by_name)
        for entry in entries:
            if counts[entry.alias] == 1 and entry.alias.lower() not in forbidden_network_aliases:
                names.setdefault(entry.alias, entry)
        for entry in entries:
            for below in self._paths_below(entry):
                names.setdefault(below, entry)
        return names

    def _paths_below(self, entry: NetworkOnDisk) -> list[str]:
        roots = [Path(root).absolute() for root in self.roots]
        return [entry.path.relative_to(root).with_suffix("").as_posix() for root in roots if entry.path.is_relative_to(root)]


# folders of the running application

_registry: LoraRegistry | None = None


def set_up(roots: Sequence[Path], store: HashStore) -> LoraRegistry:
    """Start over with these folders."""
    global _registry  # noqa: PLW0603 - extensions use this module, not an object
    _registry = LoraRegistry(roots, store)
    loaded_networks.clear()
    return _registry


def registry() -> LoraRegistry:
    """The running application's files. Raises RuntimeError before this extension is loaded."""
    if _registry is None:
        raise RuntimeError("LoRA is not set up because its extension is not loaded. Enable sd_forge_lora in the Extensions tab and restart.")
    return _registry


def list_available_networks() -> None:
    """Scan the folders again."""
    registry().refresh()


def __getattr__(name: str) -> Any:
    """`available_networks`, `available_network_aliases` and `available_network_hash_lookup`, computed on access."""
    if name == "available_networks":
        return registry().by_name()
    if name == "available_network_aliases":
        registry().by_name()
        return registry().names()
    if name == "available_network_hash_lookup":
        return {entry.known_hash[:SHORT_HASH_DIGITS]: entry for entry in registry() if entry.known_hash}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# applying them to networks


class PatchSets:
    """Cache of patches read for the current model."""

    def __init__(self) -> None:
        self._engine_key: Any = None
        self._sets: dict[tuple[str, tuple[int, int]], LoraPatchSet] = {}

    def read(self, engine: Any, entry: NetworkOnDisk) -> LoraPatchSet:
        """The file's patches for that model. Raises LoraError."""
        from backend.patcher.lora_files import match_lora, read_lora_file  # torch

        key = (entry.filename, entry.stamp)
        if key not in self._sets:
            objects = engine.forge_objects_original
            self._sets[key] = match_lora(read_lora_file(entry.path, entry.name), objects.unet, objects.clip, model_family=engine.family_title)
            log.info("LoRA %s: %d weights.", entry.name, len(self._sets[key].unet) + len(self._sets[key].clip))
        else:
            self._sets[key] = self._sets.pop(key)  # mark as most recently used
        return self._sets[key]

    def forget_other_models(self, engine: Any) -> None:
        key = getattr(engine, "load_number", id(engine))
        if key != self._engine_key:
            self._engine_key = key
            self._sets.clear()

    def forget_unused(self, applied: Sequence[Network], num_kept: int) -> None:
        in_use = {(one.network_on_disk.filename, one.network_on_disk.stamp) for one in applied}
        unused = [key for key in self._sets if key not in in_use]
        for key in unused[: max(0, len(unused) - max(0, num_kept))]:
            del self._sets[key]

    def names(self) -> list[str]:
        """Stems of the files, most recently used last."""
        return [Path(filename).stem for filename, _ in self._sets]


patch_sets = PatchSets()


def add_network(engine: Any, network: Network, patch_set: LoraPatchSet, *, online: bool = False) -> None:
    """Apply one file to clones of the model's networks."""
    objects, filename = engine.forge_objects, network.network_on_disk.filename
    objects.unet, objects.clip = _patched(
        objects.unet, objects.clip, patch_set, network.unet_multiplier, network.te_multiplier, filename, online=online
    )


def _patched(unet: Any, clip: Any, patch_set: LoraPatchSet, unet_strength: float, clip_strength: float, filename: str, *, online: bool) -> Any:
    if patch_set.unet and unet_strength:
        unet = unet.clone()
        unet.add_patches(filename=filename, patches=patch_set.unet, strength_patch=unet_strength, online_mode=online)
    if patch_set.clip and clip_strength:
        clip = clip.clone()
        clip.add_patches(filename=filename, patches=patch_set.clip, strength_patch=clip_strength)
    return unet, clip


def load_networks(
    names: Sequence[str],
    te_multipliers: Sequence[float] | None = None,
    unet_multipliers: Sequence[float] | None = None,
    dyn_dims: Sequence[int | None] | None = None,
) -> None:
    """Apply exactly these LoRA files to the current model. Unknown names are logged. Raises LoraError."""
    from modules import shared

    engine = shared.sd_model
    if engine is None:
        raise RuntimeError("LoRA: no model is loaded yet. Generate a picture first, or call sd_models.load_model().")
    patch_sets.forget_other_models(engine)
    engine.forge_objects.unet, engine.forge_objects.clip = engine.forge_objects_original.unet, engine.forge_objects_original.clip
    used = []
    for number, name in enumerate(names):
        if (entry := registry().find(name)) is None:
            log.warning("LoRA %s: there is no such file in %s.", name, ", ".join(map(str, registry().roots)))
            continue
        te = te_multipliers[number] if te_multipliers else 1.0
        unet = unet_multipliers[number] if unet_multipliers else te
        network = Network(entry.name, entry, te, unet, mentioned_name=name)
        add_network(engine, network, keep_modules(network, patch_sets.read(engine, entry)))
        used.append(network)
    remember(engine, used)
    engine.forge_objects_after_applying_lora = engine.forge_objects.shallow_copy()


def use_bundled_embeddings(engine: Any, used: Sequence[Network]) -> list[str]:
    """Make the embeddings bundled with these files (`bundle_emb`), and no others, usable in prompts; returns reasons for unusable ones."""
    from backend.text_processing.embedding import Embedding, EmbeddingError  # torch

    embeddings, reasons = {}, []
    for network in used:
        entry = network.network_on_disk
        for name, tables in patch_sets.read(engine, entry).embeddings.items():
            try:
                vectors = {key: table.float().reshape(-1, table.shape[-1]) for key, table in tables.items() if table.ndim}
                embeddings[name] = Embedding(name=name, vectors_by_encoder=vectors, filename=entry.path, hash=f"{entry.path} {entry.stamp} {name}")
            except (EmbeddingError, RuntimeError) as error:
                reasons.append(f"LoRA {entry.name}: its embedding {name[:100]} cannot be used: {error}.")
    database = getattr(engine, "embeddings", None)
    return reasons if database is None else [*reasons, *database.use_bundled(embeddings)]


def keep_modules(network: Network, patch_set: LoraPatchSet) -> LoraPatchSet:
    """Record for extensions which weights a network changes; returns the same set."""
    network.modules = {**patch_set.unet, **patch_set.clip}
    return patch_set


def remember(engine: Any, used: Sequence[Network]) -> None:
    """Store what is in use, where text conditioning checks whether its cache is still valid."""
    loaded_networks[:] = used
    facts = [(one.network_on_disk.filename, *one.network_on_disk.stamp, one.te_multiplier, one.unet_multiplier) for one in used]
    engine.current_lora_hash = str(facts)


def load_lora_state_dict(filename: str) -> dict[str, Any]:
    """The tensors of a LoRA file by name. Raises CheckpointError."""
    from backend.checkpoint_file import open_tensor_file  # torch

    with open_tensor_file(Path(filename)) as file:
        return {key: file.read(key) for key in file.infos}


def load_lora_for_models(
    model: Any, clip: Any, lora: Mapping[str, Any], strength_model: float, strength_clip: float, filename: str = "default", online_mode: bool = False
) -> tuple[Any, Any]:
    """(UNet patcher, CLIP): clones with a LoRA's state dict applied. Raises LoraError."""
    from backend.patcher.lora_files import match_lora, parse_lora  # torch

    patch_set = match_lora(parse_lora(Path(filename).stem, lora), model, clip)
    unet, clip = _patched(model, clip, patch_set, strength_model, strength_clip, filename, online=online_mode)
    return unet, clip
