"""A slot: one place to compute. Knows no memory state and no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Slot:
    """A place to compute that a plan may name.

    `index` is the position in `--device-id` (or in the list of all devices), `total_bytes` the most memory the slot may use.
    `relative_speed` is an estimate relative to the first slot (1.0), used until a speed is measured.
    Two slots may share one torch device.
    """

    index: int
    torch_device: torch.device
    name: str
    total_bytes: int
    relative_speed: float = 1.0
    cpu_threads: int | None = None
    """Intra-op threads of a CPU slot's worker; None on other devices."""

    def __post_init__(self) -> None:
        if self.index < 0 or self.total_bytes < 0 or self.relative_speed <= 0:
            raise ValueError(
                f"Slot {self.index} ({self.name}): index {self.index} and total_bytes {self.total_bytes} must be 0 or more, "
                f"relative_speed {self.relative_speed} above 0."
            )

    def __str__(self) -> str:
        return f"slot {self.index}: {self.torch_device} {self.name}, {format_bytes(self.total_bytes)}"


def format_bytes(size_bytes: int) -> str:
    """ "23.7 GiB"; below one GiB, "512 MiB"."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


def canonical_device(device: torch.device | str) -> torch.device:
    """The device as tensors on it report it: "cuda" becomes cuda:0, "cpu:0" becomes cpu."""
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return torch.device(device.type)
    index: int | None = device.index
    return torch.device(device.type, index or 0)
