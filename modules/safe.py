"""Reading pickled files under the names that extensions import. Tensors and plain values only, unless an extension asks for more by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load(filename: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.load that makes nothing but tensors and plain values. Raises what torch.load raises for files that hold more."""
    import torch  # heavy; importing this file must not wait for it

    return torch.load(filename, *args, **{"map_location": "cpu", **kwargs, "weights_only": True})


def load_with_extra(filename: Any, extra_handler: Callable[[str, str], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """As load(); `extra_handler` of old programs is not asked."""
    return load(filename, *args, **kwargs)


def unsafe_torch_load(filename: Any, *args: Any, **kwargs: Any) -> Any:
    """torch.load that makes whatever the file says, code included: for an extension's own model files, on that extension's word."""
    import torch  # heavy; importing this file must not wait for it

    return torch.load(filename, *args, **{**kwargs, "weights_only": False})
