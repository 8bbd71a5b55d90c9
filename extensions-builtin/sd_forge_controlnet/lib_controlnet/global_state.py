"""The available preprocessors and control models, by the names that pages and clients see."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from backend.model_folders import find_files, say_once
from modules import sd_models, shared
from modules.application import current_application
from modules.errors import RequestError
from modules.hashes import HASHES_OF_NOTHING
from modules.nearest_names import say_nearest
from modules_forge.network_preprocessors import OLD_NAMES
from modules_forge.shared import supported_preprocessors, try_load_supported_control_model

log = logging.getLogger(__name__)

NONE = "None"
CN_MODEL_EXTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".patch")
CONTROL_TYPES = (
    "Blur", "Canny", "Depth", "Inpaint", "Lineart", "MLSD", "NormalMap", "OpenPose", "Recolor", "Scribble", "Segmentation", "Shuffle", "Sketch",
    "SoftEdge", "Tile",
)  # fmt: skip
_MORE_FILTERS = {
    "Canny": ("edge",),
    "Lineart": ("line",),
    "Sketch": ("scribble",),
    "SoftEdge": ("hed", "pidi", "teed"),
    "Segmentation": ("seg",),
    "NormalMap": ("normal",),
    "OpenPose": ("pose",),
}

controlnet_filename_dict: dict[str, str] = {NONE: ""}
"""Title -> path, as of the last scan."""
controlnet_names: list[str] = [NONE]
_loaded: dict[tuple[str, int, int, str], Any] = {}


def model_folders() -> list[Path]:
    """The folders of control models."""
    extra = str(shared.opts.control_net_models_path or "").strip()
    return [*current_application().config.controlnet_dirs, *([Path(extra)] if extra else [])]


def update_controlnet_filenames() -> None:
    """Scan the folders again."""
    found: dict[str, str] = {}
    for folder in model_folders():
        for path in find_files(folder, CN_MODEL_EXTS):
            try:
                found.setdefault(f"{path.stem} [{sd_models.model_hash(str(path))}]", str(path))
            except OSError as error:
                say_once(f"Control model {path} cannot be read ({error}); it is ignored.")
    controlnet_filename_dict.clear()
    controlnet_filename_dict.update({NONE: "", **found})
    controlnet_names[:] = list(controlnet_filename_dict)


def get_all_controlnet_names() -> list[str]:
    """Titles of all control models; "None" comes first."""
    return list(controlnet_names)


def get_controlnet_filename(name: str) -> str | None:
    """The path of a model, by title, stem, file name or the hash in its title, in any case."""
    for _ in range(2):
        if (found := _look_up(name.strip().lower())) is not None:
            return found
        update_controlnet_filenames()  # the file may be new
    return None


def _look_up(wanted: str) -> str | None:
    """Look up by title, stem and file name, then by hash, then by the name before a different hash. Accepts Windows paths."""
    models = [(title.lower(), *title.lower().rpartition(" [")[::2], path) for title, path in controlnet_filename_dict.items() if path]
    for asked in dict.fromkeys((wanted, wanted.replace("\\", "/").rpartition("/")[2])):
        for title, stem, _, path in models:
            if asked in (title, stem, Path(path).name.lower()):
                return path
        for _, _, short_hash, path in models:
            short_hash = short_hash.rstrip("]")
            if short_hash not in HASHES_OF_NOTHING and asked in (short_hash, f"[{short_hash}]"):
                return path
        bare = asked.rpartition(" [")[0] if asked.endswith("]") else ""
        for _, stem, _, path in models:
            if bare and bare in (stem, Path(path).name.lower()):
                return path
    return None


def get_all_preprocessor_names() -> list[str]:
    """Names of all preprocessors, in page order."""
    return list(get_sorted_preprocessors())


def get_sorted_preprocessors() -> dict[str, Any]:
    """ "None" first, then sorted by name."""
    rest = sorted((name for name in supported_preprocessors if name != NONE), key=str.lower)
    return {name: supported_preprocessors[name] for name in ([NONE] if NONE in supported_preprocessors else []) + rest}


def get_preprocessor(name: str) -> Any:
    """The preprocessor with that name, in any case, with or without the part in parentheses, or by its old name; None if unknown."""
    asked = name.strip().lower()
    for wanted in (asked, OLD_NAMES.get(asked, asked).lower()):
        for known, preprocessor in supported_preprocessors.items():
            if wanted in (known.lower(), known.lower().split(" (")[0]):
                return preprocessor
    return None


def get_all_preprocessor_tags() -> list[str]:
    """The control types; "All" comes first."""
    tags = {tag for preprocessor in supported_preprocessors.values() for tag in preprocessor.tags}
    return ["All", *sorted(tags | set(CONTROL_TYPES))]


def get_filtered_preprocessor_names(tag: str) -> list[str]:
    """Preprocessors of a type; the best match comes right after "None"."""
    if tag == "All":
        return get_all_preprocessor_names()
    fitting = [(-preprocessor.sorting_priority, name) for name, preprocessor in supported_preprocessors.items() if tag in preprocessor.tags]
    return [NONE, *(name for _, name in sorted(fitting) if name != NONE)]


def get_filtered_preprocessors(tag: str) -> dict[str, Any]:
    """As get_filtered_preprocessor_names(), with the preprocessors themselves."""
    return {name: supported_preprocessors[name] for name in get_filtered_preprocessor_names(tag) if name in supported_preprocessors}


def get_filtered_controlnet_names(tag: str) -> list[str]:
    """Models whose names match a type."""
    if tag == "All":
        return get_all_controlnet_names()
    filters = [tag.lower(), *_MORE_FILTERS.get(tag, ())]
    for preprocessor in supported_preprocessors.values():
        if list(preprocessor.tags) == [tag]:
            filters += [one.lower() for one in preprocessor.model_filename_filters]
    return [NONE, *(name for name in controlnet_names if name != NONE and any(one in name.lower() for one in filters))]


def select_control_type(control_type: str) -> tuple[list[str], list[str], str, str]:
    """(preprocessors, models, default preprocessor, default model) of a type."""
    modules, models = get_filtered_preprocessor_names(control_type), get_filtered_controlnet_names(control_type)
    is_all = control_type == "All"
    return modules, models, modules[1] if len(modules) > 1 and not is_all else NONE, models[1] if len(models) > 1 and not is_all else NONE


def load_model(name: str, *, keep: int) -> Any:
    """The control model with that name; the last `keep` stay in memory. Raises RequestError if it is missing or unusable."""
    path = get_controlnet_filename(name)
    if path is None:
        near = say_nearest(name, controlnet_names[1:])
        raise RequestError(f"ControlNet model {name[:200]!r} does not exist; {near}. Put its file into {model_folders()[0]} and refresh the list.")
    stat = Path(path).stat()
    key = (path, stat.st_mtime_ns, stat.st_size, str(_device()))
    model = _loaded.pop(key, None)
    if model is None:
        model = _read(path)
    _loaded[key] = model
    for old in list(_loaded)[: max(0, len(_loaded) - max(1, keep))]:
        del _loaded[old]
    return model


def _read(path: str) -> Any:
    from backend.checkpoint_file import CheckpointError, open_tensor_file
    from backend.controlnet_loader import build_control, reads_control, refuse_other_files
    from modules_forge.supported_controlnet import ControlNetPatcher

    try:
        with open_tensor_file(Path(path)) as file:
            if reads_control(file.infos):  # tensor by tensor, to avoid two copies in memory
                return ControlNetPatcher(build_control(file))
        model = try_load_supported_control_model(path)
        if model is None:
            with open_tensor_file(Path(path)) as file:
                refuse_other_files(file)
    except CheckpointError as error:
        raise RequestError(str(error)) from error
    return model


def _device() -> Any:
    from backend import memory_management

    return memory_management.get_torch_device()


def forget_models() -> None:
    """Release all loaded control models."""
    _loaded.clear()
