"""The process's memory store, and the flags and slots it was configured with. Importing this module probes nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backend.args import BackendConfig
from backend.devices.probing import probe_devices
from backend.memory.store import MemoryStore

if TYPE_CHECKING:
    from backend.devices.slot import Slot


@dataclass(slots=True)
class _Configured:
    """What `configure` set; one per process."""

    store: MemoryStore | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


_configured = _Configured()


def configure(config: BackendConfig, slots: Sequence[Slot]) -> None:
    """Use these flags and slots from now on. First takes models placed earlier off their devices."""
    with _configured.lock:
        if _configured.store is not None:
            _configured.store.unload_all()
        _configured.store = MemoryStore(config, slots)


def current_store() -> MemoryStore:
    """The configured store. If none is configured yet, configures a default: all flags off, the first device."""
    store = _configured.store
    return store if store is not None else _configure_default()


def _configure_default() -> MemoryStore:
    with _configured.lock:
        if _configured.store is None:
            config = BackendConfig()
            _configured.store = MemoryStore(config, probe_devices(config))
        return _configured.store


def forget() -> None:
    """Drop the store without moving anything. The next use configures a default one. For tests."""
    _configured.store = None
