"""What the driver reports about NVIDIA cards through NVML: use, temperature, power, link. A missing driver or package is not an error.

Knows no slots: `read_telemetry` lists all cards of the driver, `find_telemetry` picks the one behind a torch device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuTelemetry:
    """One card at one moment. Values that the card does not report (laptops and old cards omit some) are None."""

    uuid: str
    name: str
    driver: str
    total_bytes: int
    used_bytes: int
    utilization_percent: int | None
    temperature_celsius: int | None
    power_watts: float | None
    power_limit_watts: float | None
    pcie_generation: int | None
    pcie_lanes: int | None

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.used_bytes / 2**30:.1f} of {self.total_bytes / 2**30:.1f} GiB"]
        parts += [f"{self.utilization_percent} %"] if self.utilization_percent is not None else []
        parts += [f"{self.temperature_celsius} °C"] if self.temperature_celsius is not None else []
        parts += [f"{self.power_watts:.0f} W"] if self.power_watts is not None else []
        parts += [f"PCIe {self.pcie_generation} x{self.pcie_lanes}"] if self.pcie_generation is not None else []
        return ", ".join(parts)


def read_telemetry() -> tuple[GpuTelemetry, ...]:
    """All cards of the driver, in its order; empty without an NVIDIA driver or without the package nvidia-ml-py."""
    nvml = _import_nvml()
    if nvml is None:
        return ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        logger.debug("No telemetry: %s.", error)
        return ()
    try:
        return tuple(_read_card(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError as error:
        logger.warning("The NVIDIA driver stopped answering (%s); no telemetry.", error)
        return ()
    finally:
        nvml.nvmlShutdown()


def find_telemetry(device: torch.device, cards: tuple[GpuTelemetry, ...]) -> GpuTelemetry | None:
    """The card behind a CUDA device, found by UUID: torch's indexes differ from the driver's if CUDA_VISIBLE_DEVICES is set."""
    if device.type != "cuda" or not cards:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return next((card for card in cards if card.uuid.removeprefix("GPU-") == uuid.removeprefix("GPU-")), None)


def _import_nvml() -> Any:
    try:
        import pynvml  # optional: useful only on NVIDIA machines
    except ImportError:
        return None
    return pynvml


def _read_card(nvml: Any, handle: Any) -> GpuTelemetry:
    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nvml.NVMLError:
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    power_mw, limit_mw = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle)), ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    return GpuTelemetry(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        utilization_percent=ask(lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        temperature_celsius=ask(lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        power_watts=None if power_mw is None else power_mw / 1000,
        power_limit_watts=None if limit_mw is None else limit_mw / 1000,
        pcie_generation=ask(lambda: int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle))),
        pcie_lanes=ask(lambda: int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle))),
    )


def _text(value: str | bytes) -> str:
    """Text from NVML, whose older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else value
