"""Finds this machine's devices and prepares the engine for them, once per process: a server does it, and every worker of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from modules.launch.inert_flags import DEVICE_ROWS, FlagFacts, find_inert_flags

if TYPE_CHECKING:
    from backend.devices.slot import Slot
    from modules.app_config import AppConfig

log = logging.getLogger(__name__)


def find_devices(config: AppConfig) -> None:
    """Probe the devices and configure memory, threads and attention for them. Raises DeviceError if a flag names a missing one."""
    from backend import memory_management  # imports torch
    from backend.attention import configure_attention
    from backend.devices import link_test
    from backend.devices.cpu_threads import apply_cpu_threads
    from backend.devices.determinism import apply_determinism
    from backend.devices.probing import probe_devices
    from backend.storage.fusing import configure_fusing

    link_test.keep_verdicts_in(config.data_dir / "cache")
    slots = probe_devices(config.backend)
    memory_management.configure(config.backend, slots)
    apply_cpu_threads(config.backend, slots)
    apply_determinism(config.backend)
    configure_attention(config.backend)
    configure_fusing(config.backend.compile_dequantization)
    warn_of_inert_flags(config, slots)


def warn_of_inert_flags(config: AppConfig, slots: Sequence[Slot]) -> None:
    """Log a line for each flag without effect on these devices. Those that depend only on other flags were logged before."""
    from backend.devices.inventory import describe_device  # imports torch

    kinds = tuple(describe_device(slot.torch_device).kind for slot in slots)
    gpus = tuple(str(slot.torch_device) for kind, slot in zip(kinds, slots) if kind != "cpu")
    facts = FlagFacts(flags=config.flags, kinds=kinds if config.backend.multi_gpu else kinds[:1], gpus=gpus)
    for sentence in find_inert_flags(DEVICE_ROWS, facts):
        log.warning("%s", sentence)
