"""Tensors out of a PyTorch pickle, with nothing in it run.

Only PyTorch's restricted unpickler reads. Checkpoints of 2022 were saved whole by their trainers and name callback classes of PyTorch Lightning
and the like: such names, and only names from that short list of packages, are answered by an inert stand-in; any other foreign name refuses the file.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

TRAINER_PACKAGES = frozenset(
    {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf", "numpy", "argparse", "pathlib", "typing"}
    | {"transformers", "diffusers", "ldm", "sgm", "taming"}
)
TRAINER_NAMES = frozenset({"collections.defaultdict", "torch.optim.adamw.AdamW", "torch.optim.adam.Adam", "torch.optim.lr_scheduler.LambdaLR"})
WRAPPER_KEYS = ("state_dict", "params_ema", "params", "model_state_dict", "model")


class UnsafePickleError(Exception):
    """The pickle names code that is not data, or uses instructions that only code needs."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every named tensor of the file, unwrapped from a trainer's `state_dict` where there is one; zip archives are mapped, not read.

    Raises:
        UnsafePickleError: it names functions or classes that are neither tensors nor a known trainer's.
        RuntimeError, ValueError, EOFError, OSError: it is damaged.
    """
    is_zip = zipfile.is_zipfile(path)
    names = _foreign_names(path) if is_zip else []
    refused = sorted(name for name in names if not _is_trainers(name))
    if refused:
        raise UnsafePickleError(_refusal(", ".join(refused[:3])))
    try:
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about newer pickle protocols: what they hold is read or refused all the same
            content = _load(path, is_zip)
    except UnpicklingError as error:
        raise UnsafePickleError(_refusal(_named_in(error))) from error
    return _named_tensors(content)


def _load(path: Path, is_zip: bool) -> Any:
    if path.suffix.lower() != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    with path.open("rb") as stream:  # a pickle under a wrong name: given the path, torch would go by the name
        return torch.load(stream, map_location="cpu", weights_only=True)


def _foreign_names(path: Path) -> list[str]:
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except UnpicklingError as error:
        raise UnsafePickleError(_refusal(_named_in(error))) from error


def _named_in(error: UnpicklingError) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match[1] if match else "instructions that PyTorch's safe reader refuses"


def _is_trainers(name: str) -> bool:
    return name in TRAINER_NAMES or name.partition(".")[0] in TRAINER_PACKAGES


def _refusal(what: str) -> str:
    return (
        f"is a pickle with more than tensors in it ({what}), which could run code on this computer; it was not loaded and nothing in it was run. "
        "Get the .safetensors version of this model, or convert it on a computer where you trust it"
    )


class _StandIn:
    """Takes the place of a trainer's class: accepts whatever the pickle gives it and does nothing."""

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


def _flatten(table: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Tensors under dotted names; tables inside tables are followed, everything else is left out."""
    found: dict[str, Tensor] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, Mapping):
            found.update(_flatten(value, f"{name}."))
    return found
