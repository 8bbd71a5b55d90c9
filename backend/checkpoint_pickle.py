"""Reads tensors from a PyTorch pickle without running any code in it.

Only PyTorch's restricted unpickler is used. Trainers in 2022 saved their whole state, so those checkpoints name callback classes of PyTorch
Lightning and similar packages. Names from a short list of such packages become inert stand-ins; a file with any other foreign name is refused.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from backend.pickle_scan import MAX_DEPTH, scan_file
from backend.pickle_scan import DamagedPickleError as DamagedPickleError

TRAINER_PACKAGES = frozenset(
    {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf", "numpy", "argparse", "pathlib", "typing"}
    | {"transformers", "diffusers", "ldm", "sgm", "taming"}
)
TRAINER_NAMES = frozenset({"collections.defaultdict", "torch.optim.adamw.AdamW", "torch.optim.adam.Adam", "torch.optim.lr_scheduler.LambdaLR"})
_MAX_SHARED = 16
_MAX_ENTRIES = 1_000_000
_MAX_KEY_LETTERS = 2000
# Every exception that a damaged file has been seen to raise in the readers below.
_READ_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, ArithmeticError, AssertionError, MemoryError,
    NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
WRAPPER_KEYS = ("state_dict", "params_ema", "params", "model_state_dict", "model")


class UnsafePickleError(Exception):
    """The pickle names code, or uses instructions that only code needs."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All named tensors of the file, from a trainer's `state_dict` if it has one. Zip archives are mapped, not read.

    Raises:
        UnsafePickleError: it names functions or classes that are neither tensors nor from a known trainer.
        DamagedPickleError: it cannot be read, or would need much more memory than the file has bytes.
    """
    tensors = _named_tensors(load_content(path))
    _check_extent(tensors.values(), path.stat().st_size)
    return tensors


def load_content(path: Path, safe: Sequence[type] = ()) -> Any:
    """The pickle's content, with tensors as stored. `safe`: classes it may instantiate. Raises: as `load_tensors`."""
    try:
        asked = scan_file(path)
        is_zip = zipfile.is_zipfile(path)
        names = _foreign_names(path) if is_zip else [name for name in asked if _is_trainers(name)]
        names = [name for name in names if not any(name == f"{one.__module__}.{one.__qualname__}" for one in safe)]
        refused = sorted(name for name in names if not _is_trainers(name))
        if refused:
            raise UnsafePickleError(_refusal(", ".join(refused[:3])))
        with torch.serialization.safe_globals([*safe, *((_stand_in(name), name) for name in names)]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about newer pickle protocols: their content is read or refused in the same way
            return _load(path, is_zip)
    except UnpicklingError as error:
        raise UnsafePickleError(_refusal(_named_in(error))) from error
    except (UnsafePickleError, DamagedPickleError):
        raise
    except _READ_ERRORS as error:
        raise DamagedPickleError((str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from error


def _load(path: Path, is_zip: bool) -> Any:
    if path.suffix.lower() != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    with path.open("rb") as stream:  # a pickle with a wrong suffix: given the path, torch would trust the suffix
        return torch.load(stream, map_location="cpu", weights_only=True)


def _check_extent(tensors: Iterable[Tensor], file_bytes: int) -> None:
    """Refuse tensors larger than the file allows: tensors may share storage, and a few bytes may be declared a tensor of any size."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors if _is_plain(tensor)]
    if max(sizes, default=0) > file_bytes or sum(sizes) > _MAX_SHARED * file_bytes:
        raise DamagedPickleError(f"its tensors would take {sum(sizes) / 1e6:,.0f} MB")


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise DamagedPickleError("it has sparse, quantized or meta tensors, which no supported model uses")
    return True


def _foreign_names(path: Path) -> list[str]:
    return list(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))


def _named_in(error: UnpicklingError) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match[1] if match else "instructions that PyTorch's safe reader refuses"


def _is_trainers(name: str) -> bool:
    return name in TRAINER_NAMES or name.partition(".")[0] in TRAINER_PACKAGES


def _refusal(what: str) -> str:
    return (
        f"is a pickle that contains more than tensors ({what}) and could run code on this computer. It was not loaded, and nothing in it was run. "
        "Get the .safetensors version of this model, or convert it on a computer where you trust it"
    )


class _StandIn:
    """Replaces a trainer's class: accepts any arguments and does nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


def _stand_in(name: str) -> Any:
    return type(name.rpartition(".")[2], (_StandIn,), {})


def _named_tensors(content: Any) -> dict[str, Tensor]:
    if isinstance(content, Tensor):
        return {"": content}
    if not isinstance(content, Mapping):
        return {}
    for wrapper in WRAPPER_KEYS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return _flatten(inner)
    return _flatten(content)


def _flatten(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors under dotted names. Nested tables are followed, everything else is ignored.

    The same table may appear many times, so entries are counted. The scan limits the depth, except for a table that contains itself.
    """
    found: dict[str, Tensor] = {}
    pending: list[tuple[str, Mapping[Any, Any], int]] = [("", content, 0)]
    num_entries = 0
    while pending:
        prefix, table, depth = pending.pop()
        num_entries += len(table)
        if depth > MAX_DEPTH or num_entries > _MAX_ENTRIES:
            raise DamagedPickleError("its tables contain each other")
        for key, value in table.items():
            name = f"{prefix}{_text_of(key)}"
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, Mapping):
                pending.append((f"{name}.", value, depth + 1))
    return found


def _text_of(key: Any) -> str:
    text = str(key) if isinstance(key, (str, int)) else type(key).__name__
    if len(text) > _MAX_KEY_LETTERS:
        raise DamagedPickleError(f"a name in it has {len(text):,} letters")
    return text.encode("utf-8", "replace").decode()
