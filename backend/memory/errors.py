"""The out-of-memory error: what was requested, and which models use how much on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRow:
    """One device's row in the table. `holders` are (name, bytes) of the models on it."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int
    holders: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        held = ", ".join(f"{name} {size_bytes / MIB:.0f} MiB" for name, size_bytes in self.holders) or "no model"
        return f"{self.device} ({self.name}): total {self.total_bytes / MIB:.0f} MiB, free {self.free_bytes / MIB:.0f} MiB, used by {held}"


class OutOfMemory(RuntimeError):
    """A device has no room for the request, even after everything that could be evicted was."""

    def __init__(self, what: str, *, device: str, need_bytes: int | None, table: Sequence[DeviceRow], remedy: str = "") -> None:
        self.what, self.device, self.need_bytes, self.table = what, device, need_bytes, tuple(table)
        asked = f", which needs {need_bytes / MIB:.0f} MiB" if need_bytes is not None else ""
        remedy = remedy or "Make the picture or the batch smaller, start with --lowvram, or close other programs that use the device."
        super().__init__("\n  ".join([f"{device} ran out of memory during {what}{asked}. {remedy}", *(str(row) for row in self.table)]))
