"""Loading pickled files under the names that extensions import. Tensors and plain values only, unless an extension explicitly asks for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load(filename: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.load restricted to tensors and plain values. Raises what torch.load raises for files that contain more."""
    import torch  # heavy; only needed when a file is loaded

    return torch.load(filename, *args, **{"map_location": "cpu", **kwargs, "weights_only": True})


def load_with_extra(filename: Any, extra_handler: Callable[[str, str], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """Like load(); the `extra_handler` of older extensions is ignored."""
    return load(filename, *args, **kwargs)


def unsafe_torch_load(filename: Any, *args: Any, **kwargs: Any) -> Any:
    """Unrestricted torch.load, which can run code from the file: for an extension's own model files, at that extension's risk."""
    import torch  # heavy; only needed when a file is loaded

    return torch.load(filename, *args, **{**kwargs, "weights_only": False})
