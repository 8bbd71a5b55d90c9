"""The known families, in the order in which they are tried on a file. A family is a folder with `FAMILY` in its `__init__`; there is no list."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from backend import families as _package
from backend.checkpoint_file import TensorFile
from backend.families.family import Family, FoundDenoiser
from backend.tensor_file import refusing_odd_shapes

_added: list[Family] = []
_built_in: list[Family] = []


def all_families() -> tuple[Family, ...]:
    """All families, lowest rank first. The first call reads the folders."""
    if not _built_in:
        names = [info.name for info in pkgutil.iter_modules(_package.__path__) if info.ispkg]
        found = [_family_of(importlib.import_module(f"{_package.__name__}.{name}")) for name in names]
        _built_in[:] = found  # all or none: after a folder that fails, the next call fails too instead of missing families
    return tuple(sorted([*_built_in, *_added], key=lambda family: (family.rank, family.name)))


def find_family(name: str) -> Family:
    """Raises: KeyError."""
    for family in all_families():
        if family.name == name:
            return family
    raise KeyError(f"Family {name!r} is unknown. Use one of {', '.join(family.name for family in all_families())}.")


def identify(file: TensorFile) -> tuple[Family, FoundDenoiser] | None:
    """The first family that finds its denoiser in the file. Raises: CheckpointError for an unsupported relative, or shapes that no network has."""
    with refusing_odd_shapes(file):
        for family in all_families():
            found = family.identify(file)
            if found is not None:
                return family, found
    return None


def known_lines() -> str:
    """The loadable models, for a message: "SD 1.x, SD 2.x and SDXL"."""
    lines = sorted({family.line for family in all_families()})
    return f"{', '.join(lines[:-1])} and {lines[-1]}" if len(lines) > 1 else lines[0]


def load_family(folder: Path) -> Family:
    """The family in a folder outside this package. Raises: ImportError if there is none."""
    name = f"{_package.__name__}_of_{folder.parent.name}.{folder.name}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} has no __init__.py, so it is not a family. Add one that defines FAMILY.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return _family_of(module)


@contextmanager
def families_in(folder: Path) -> Iterator[tuple[Family, ...]]:
    """Add the families in the subfolders of `folder` for the duration of the block."""
    found = tuple(load_family(path.parent) for path in sorted(folder.glob("*/__init__.py")))
    _added.extend(found)
    try:
        yield found
    finally:
        for family in found:
            _added.remove(family)


def _family_of(module: ModuleType) -> Family:
    family = getattr(module, "FAMILY", None)
    if not isinstance(family, Family):
        raise ImportError(f"{module.__name__} has no FAMILY. Define one in its __init__.")
    return family
