"""The option "Diffusion in Low Bits": Forge's values, and how each has weights stored."""

from __future__ import annotations

STORAGE_DTYPES = {"float8-e4m3fn": "float8_e4m3fn", "float8-e5m2": "float8_e5m2"}
"""Kind -> name of a torch dtype."""
PACKED_FORMATS = {"bnb-nf4": "nf4", "bnb-fp4": "fp4"}
"""Kind -> name of a packed format (`backend.storage.choices`)."""
AUTOMATIC = "Automatic"
_KINDS = (AUTOMATIC, "bnb-nf4", "float8-e4m3fn", "bnb-fp4", "float8-e5m2")
ONLINE_MARK = "(fp16 LoRA)"
"""Behind a kind: a LoRA never changes the stored weights."""
LOW_BITS = tuple(f"{kind}{ending}" for kind in _KINDS for ending in ("", f" {ONLINE_MARK}"))
"""The values, in Forge's order."""


def storage_of_low_bits(value: str) -> str | None:
    """A torch dtype's name, or a packed format's, for a value; None lets the engine choose."""
    kind = str(value).split(" ", maxsplit=1)[0]
    return STORAGE_DTYPES.get(kind) or PACKED_FORMATS.get(kind)
