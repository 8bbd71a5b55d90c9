"""Out of memory as an error of its own: what was asked for, and who holds what on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRow:
    """One device's line in the table; `holders` are (name, bytes) of the models on it."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int
    holders: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        held = ", ".join(f"{name} {size_bytes / MIB:.0f} MiB" for name, size_bytes in self.holders) or "no model"
        return f"{self.device} ({self.name}): total {self.total_bytes / MIB:.0f} MiB, free {self.free_bytes / MIB:.0f} MiB, held by {held}"


class OutOfMemory(RuntimeError):
    """A device has not the room for what was asked, after everything that could leave has left."""

    def __init__(self, what: str, *, device: str, need_bytes: int | None, table: Sequence[DeviceRow], remedy: str = "") -> None:
        self.what, self.device, self.need_bytes, self.table = what, device, need_bytes, tuple(table)
        asked = f", which asks for {need_bytes / MIB:.0f} MiB" if need_bytes is not None else ""
        remedy = remedy or "Make the picture or the batch smaller, or start with --lowvram, or free the device of other programs."
        super().__init__("\n  ".join([f"{device} ran out of memory at {what}{asked}. {remedy}", *(str(row) for row in self.table)]))
