"""The current model: which checkpoint a request means, loading it, and keeping the old one usable if that fails. Forge's names are at the end.

The engine loads files (backend/loader.py); this file decides what and when. Must not know prompts, pictures or the page.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.args import BackendConfig
from backend.memory.recent_models import RecentModels, recent_models_budget_bytes
from modules.checkpoints.import_lock import network_imports
from modules.checkpoints.listing import CheckpointInfo, CheckpointRegistry, read_safetensors_header, read_safetensors_metadata
from modules.checkpoints.vae_files import ModuleRegistry
from modules.errors import RequestError
from modules.jobs.context import required_context
from modules.settings.low_bits import AUTOMATIC, PACKED_FORMATS, storage_of_low_bits

if TYPE_CHECKING:
    from backend.diffusion_engine.base import ForgeDiffusionEngine

log = logging.getLogger(__name__)

__all__ = [
    "CheckpointInfo",
    "CheckpointRegistry",
    "ModelHost",
    "ModelRequest",
    "read_metadata_from_safetensors",
    "select_starting_checkpoint",
]

LoadEngine = Callable[["ModelRequest", BackendConfig], "ForgeDiffusionEngine"]

_load_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRequest:
    """What to load. Equal requests share an engine; a changed file makes a different request."""

    checkpoint: CheckpointInfo
    additional_modules: tuple[Path, ...] = ()
    unet_storage_dtype: str | None = None
    embedding_dirs: tuple[Path, ...] = ()
    multi_gpu_strategy: str = field(default="auto", compare=False)
    """How the job that loads it divides pictures. It decides where weights lie at first, so it makes no other model."""

    def identity(self) -> tuple[object, ...]:
        files = (self.checkpoint.path, *self.additional_modules)
        return (*((str(path), *_stamp(path)) for path in files), self.unet_storage_dtype)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def load_engine(request: ModelRequest, config: BackendConfig) -> ForgeDiffusionEngine:
    """Read the files. Raises ModelLoadError."""
    import torch  # heavy; the server starts answering before it is loaded

    with network_imports:
        from backend.loader import CheckpointError, load_checkpoint  # imports torch

    wanted = request.unet_storage_dtype
    is_packed = wanted in PACKED_FORMATS.values()
    try:
        return load_checkpoint(
            request.checkpoint.path,
            config=replace(config, multi_gpu_strategy=request.multi_gpu_strategy),
            additional_modules=request.additional_modules,
            unet_storage_dtype=None if wanted is None or is_packed else getattr(torch, wanted),
            unet_format=wanted if is_packed else None,
            embedding_dirs=request.embedding_dirs,
        )
    except CheckpointError as error:
        raise ModelLoadError(str(error)) from error


class ModelLoadError(RequestError):
    """The chosen files do not form a model. The message comes from the engine."""


class ModelHost:
    """Owns the loaded engine and earlier ones kept in main memory. Only the job worker calls methods that change it."""

    def __init__(
        self,
        checkpoints: CheckpointRegistry,
        additional_modules: ModuleRegistry,
        config: BackendConfig,
        current_options: Callable[[], Mapping[str, Any]],
        *,
        embedding_dirs: Sequence[Path] = (),
        load: LoadEngine = load_engine,
    ) -> None:
        self.checkpoints = checkpoints
        self.additional_modules = additional_modules
        self.config = config
        self.engine: ForgeDiffusionEngine | None = None
        self.request: ModelRequest | None = None
        self._current_options = current_options
        self._load = load
        self._embedding_dirs = tuple(embedding_dirs)
        self._identity: tuple[object, ...] | None = None
        self._recent: RecentModels[tuple[ForgeDiffusionEngine, ModelRequest]] = RecentModels()
        self.on_loaded: list[Callable[[ForgeDiffusionEngine], object]] = []

    @property
    def loaded_checkpoint(self) -> CheckpointInfo | None:
        return self.request.checkpoint if self.request is not None and self.engine is not None else None

    def resolve(self, options: Mapping[str, Any] | None = None) -> ModelRequest:
        """What `options` (default: the current ones) select. Rescans the folders. Raises NoCheckpointError, UnknownModuleError."""
        chosen = self._current_options() if options is None else options
        self.checkpoints.refresh()
        self.additional_modules.refresh()
        return ModelRequest(
            checkpoint=self._checkpoint_named(chosen.get("sd_model_checkpoint")),
            additional_modules=self.additional_modules.chosen_by(chosen),
            unet_storage_dtype=storage_of_low_bits(chosen.get("forge_unet_storage_dtype") or AUTOMATIC),
            embedding_dirs=self._embedding_dirs,
            multi_gpu_strategy=self._strategy_of(chosen),
        )

    def _strategy_of(self, options: Mapping[str, Any]) -> str:
        chosen = str(options.get("multi_gpu_strategy") or "auto")
        return self.config.multi_gpu_strategy if chosen == "auto" else chosen

    def _checkpoint_named(self, wanted: str | None) -> CheckpointInfo:
        if (found := self.checkpoints.find(wanted)) is not None:
            return found
        first = self.checkpoints.first()
        if wanted:
            log.warning("%s Until then, %s is used.", self.checkpoints.explain_missing(wanted), first.name)
        return first

    def ensure_loaded(self, options: Mapping[str, Any] | None = None) -> ForgeDiffusionEngine:
        """The engine for `options`, loaded if another one (or none) is current.

        Raises NoCheckpointError or ModelLoadError; the current engine then stays."""
        return self.serve(self.resolve(options))

    def serve(self, request: ModelRequest) -> ForgeDiffusionEngine:
        """The engine for `request`; see ensure_loaded."""
        identity = request.identity()
        self._drop_stranded()
        if self.engine is not None and identity == self._identity:
            return self.engine
        waiting = self._recent.take(identity)
        if waiting is not None:
            log.info("%s was still in memory.", request.checkpoint.title)
            return self._use(waiting[0], request, identity)
        request.checkpoint.calculate_shorthash()
        started = time.perf_counter()
        self._recent.shrink(budget_bytes=self._waiting_budget_bytes(), max_models=self._max_waiting())
        engine = self._load(request, self.config)
        _describe(engine, request.checkpoint)
        log.debug("Loaded %s in %.1f s.", request.checkpoint.title, time.perf_counter() - started)
        return self._use(engine, request, identity)

    def _drop_stranded(self) -> None:
        """Forget engines that are, or would be, on a device that stopped working; they are loaded again from their files."""
        if self.engine is None or not is_stranded(self.engine):
            return
        log.warning("The model was on a device that has stopped working; it will be loaded again.")
        self.engine, self.request, self._identity = None, None, None
        self._recent.clear()

    def _use(self, engine: ForgeDiffusionEngine, request: ModelRequest, identity: tuple[object, ...]) -> ForgeDiffusionEngine:
        """Make `engine` the current one; the previous one is kept in main memory if there is room."""
        before = (self.engine, self.request, self._identity)
        self.engine, self.request, self._identity = None, None, None
        if before[0] is not None and before[1] is not None:
            _free_devices()
            self._keep_waiting(before[0], before[1], before[2])
        self.engine, self.request, self._identity = engine, request, identity
        for callback in self.on_loaded:
            callback(engine)
        return engine

    def _keep_waiting(self, engine: ForgeDiffusionEngine, request: ModelRequest, identity: tuple[object, ...] | None) -> None:
        limits = {"budget_bytes": self._waiting_budget_bytes(), "max_models": self._max_waiting()}
        self._recent.put(identity, (engine, request), held_bytes(engine), **limits)

    def _max_waiting(self) -> int:
        """The number of engines allowed by "Checkpoints kept in RAM" and "Checkpoints loaded at the same time"; at least one."""
        options = self._current_options()
        return max(int(options.get("sd_checkpoint_cache") or 0), int(options.get("sd_checkpoints_limit") or 1) - 1, 1)

    def _waiting_budget_bytes(self) -> int:
        from backend import memory_management  # imports torch

        total_bytes, free_bytes = memory_management.get_total_memory(memory_management.cpu), memory_management.get_free_memory(memory_management.cpu)
        return recent_models_budget_bytes(total_bytes, free_bytes)

    def unload(self) -> None:
        """Drop all engines and free their memory; the next job loads again."""
        self.engine, self.request, self._identity = None, None, None
        self._recent.clear()
        _free_devices()


def is_stranded(engine: Any) -> bool:
    """Whether one of an engine's networks is on a device that stopped working."""
    from backend import memory_management  # imports torch

    lost = memory_management.lost_devices()
    if not lost:
        return False
    objects = engine.forge_objects_original
    patchers = (objects.unet, objects.clip.patcher, objects.vae.patcher)
    return any(patcher.load_device in lost or any(tensor.device in lost for tensor in patcher.model.parameters()) for patcher in patchers)


def held_bytes(engine: Any) -> int:
    """Bytes of an engine's networks."""
    from backend import memory_management  # imports torch

    objects = engine.forge_objects_original
    networks = (objects.unet.model, objects.clip.cond_stage_model, objects.vae.first_stage_model)
    return sum(memory_management.module_size(network) for network in networks)


def _describe(engine: ForgeDiffusionEngine, checkpoint: CheckpointInfo) -> None:
    """Set the attributes that extensions look for on an engine."""
    attributes: dict[str, Any] = {
        "sd_checkpoint_info": checkpoint,
        "sd_model_hash": checkpoint.hash,
        "sd_model_checkpoint": checkpoint.filename,
        "filename": checkpoint.filename,
        "load_number": next(_load_numbers),  # distinguishes loads, even of the same file
    }
    for name, value in attributes.items():
        setattr(engine, name, value)
    for name in ("comments", "extra_generation_params"):
        if not hasattr(engine, name):
            setattr(engine, name, [] if name == "comments" else {})


def _free_devices() -> None:
    from backend import memory_management  # imports torch

    memory_management.unload_all_models()
    memory_management.soft_empty_cache()


def select_starting_checkpoint(registry: CheckpointRegistry, *, named: Path | None, saved: str | None, want_sdxl: bool) -> CheckpointInfo | None:
    """The checkpoint at startup: --ckpt, else the saved one, else the first. With --sdxl, the first SDXL file unless it already is one."""
    infos = list(registry)
    chosen = registry.find(str(named.absolute())) if named is not None else None
    chosen = chosen or registry.find(saved) or (infos[0] if infos else None)
    if chosen is not None and saved and named is None and registry.find(saved) is None:
        log.warning("Settings: %s Until then, %s is used.", registry.explain_missing(saved), chosen.name)
    if not want_sdxl or named is not None or (chosen is not None and is_sdxl_file(chosen)):
        return chosen
    return next((info for info in infos if is_sdxl_file(info)), chosen)


def is_sdxl_file(info: CheckpointInfo) -> bool:
    """Whether a safetensors header contains SDXL's second text encoder. Reads only the header."""
    return any(key.startswith("conditioner.embedders.1.") for key in read_safetensors_header(info.path))


def read_metadata_from_safetensors(filename: str | Path) -> dict[str, Any]:
    """The metadata of a safetensors file. Raises RequestError if it is not one."""
    path = Path(filename)
    if not read_safetensors_header(path):
        raise RequestError(f"{path.name} is not a safetensors file with a readable header; download it again or choose another file.")
    return read_safetensors_metadata(path)


# Names that extensions use; they use the installed application.


class _ModelData:
    """`sd_models.model_data`: the current model as extensions see it."""

    @property
    def sd_model(self) -> Any:
        return _app().models.engine

    def get_sd_model(self) -> Any:
        return _app().models.engine

    @property
    def forge_loading_parameters(self) -> dict[str, Any]:
        request = _app().models.request
        if request is None:
            return {}
        modules = [str(path) for path in request.additional_modules]
        return {"checkpoint_info": request.checkpoint, "additional_modules": modules, "unet_storage_dtype": request.unet_storage_dtype}

    @property
    def forge_hash(self) -> str:
        return str(self.forge_loading_parameters)


model_data = _ModelData()


def _app() -> Any:
    return required_context()


def list_models() -> None:
    """Scan for checkpoints again."""
    _app().checkpoints.refresh()


def checkpoint_tiles(use_short: bool = False) -> list[str]:
    return _app().checkpoints.titles(use_short=use_short)


def get_closet_checkpoint_match(search_string: str) -> CheckpointInfo | None:
    return _app().checkpoints.find(search_string)


def match_checkpoint_to_name(name: str) -> str:
    info = _app().checkpoints.find(name)
    return name if info is None else info.title


def model_hash(filename: str) -> str:
    from modules.checkpoints.hashes import partial_hash  # the old hash

    return partial_hash(filename)


def select_checkpoint() -> CheckpointInfo:
    """The checkpoint selected in the settings. Raises NoCheckpointError."""
    return _app().models.resolve().checkpoint


def forge_model_reload() -> tuple[Any, bool]:
    """Load the model selected in the settings if needed; (model, whether it was loaded now)."""
    host = _app().models
    before = host.engine
    engine = host.ensure_loaded()
    return engine, engine is not before


def read_state_dict(checkpoint_file: str, print_global_state: bool = False, map_location: Any = None) -> dict[str, Any]:
    """All tensors of the file in host memory; for extensions."""
    from backend.state_dict import read_state_dict as read  # imports torch

    return dict(read(Path(checkpoint_file)))


def unload_model_weights(sd_model: Any = None, info: Any = None) -> None:
    _app().models.unload()


def load_model(checkpoint_info: CheckpointInfo | None = None, already_loaded_state_dict: Any = None) -> Any:
    """The model of `checkpoint_info` (default: the one selected in the settings), loaded."""
    return reload_model_weights(info=checkpoint_info)


def reload_model_weights(sd_model: Any = None, info: CheckpointInfo | None = None, forced_reload: bool = False) -> Any:
    host = _app().models
    if forced_reload:
        host.unload()
    if info is None:
        return host.ensure_loaded()
    return host.serve(dataclasses.replace(host.resolve(), checkpoint=info))


checkpoints_loaded: OrderedDict[CheckpointInfo, dict[str, Any]] = OrderedDict()
"""State dicts kept in main memory. None are: weights lie in the networks, and memory management says which networks stay."""


def __getattr__(name: str) -> Any:
    """`checkpoints_list` (title -> info), `checkpoint_aliases` (any name -> info), `model_path` (the folder) of the installed application."""
    if name == "checkpoints_list":
        return {info.title: info for info in _app().checkpoints}
    if name in ("checkpoint_aliases", "checkpoint_alisases"):
        return {text: info for info in _app().checkpoints for text in info.ids}
    if name == "model_path":
        return str(_app().config.ckpt_dirs[0])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def files_of(modules: Sequence[Path]) -> list[dict[str, str]]:
    """Fields of GET /sdapi/v1/sd-modules."""
    return [{"model_name": path.name, "filename": str(path)} for path in modules]
