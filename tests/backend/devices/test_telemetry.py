"""Telemetry with a fake NVML; on a machine with a card, also with the card."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backend.devices import telemetry
from backend.devices.telemetry import find_telemetry, read_telemetry


class NVMLError(Exception):
    pass


class FakeNvml:
    """Two cards; the second reports neither power nor link."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *, has_driver: bool = True, breaks: bool = False) -> None:
        self.has_driver, self.breaks, self.is_open = has_driver, breaks, False

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise NVMLError("NVML Shared Library Not Found")
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        if self.breaks:
            raise NVMLError("GPU is lost")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=24 * 2**30, used=6 * 2**30)

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Card {handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._unless_second(handle, 350_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return self._unless_second(handle, 450_000)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:
        return self._unless_second(handle, 4)

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return self._unless_second(handle, 16)

    @staticmethod
    def _unless_second(handle: int, value: int) -> int:
        if handle == 1:
            raise NVMLError("Not Supported")
        return value


def use(monkeypatch: pytest.MonkeyPatch, nvml: object) -> None:
    monkeypatch.setattr(telemetry, "_import_nvml", lambda: nvml)


def test_data_that_cards_report_is_returned_and_other_data_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    use(monkeypatch, nvml)
    first, second = read_telemetry()
    assert (first.uuid, first.name, first.driver, first.power_watts, first.power_limit_watts) == ("GPU-00", "Card 0", "580.1", 350.5, 450.0)
    assert str(first) == "Card 0: 6.0 of 24.0 GiB, 97 %, 61 °C, 350 W, PCIe 4 x16"
    assert str(second) == "Card 1: 6.0 of 24.0 GiB, 97 %, 61 °C"
    assert not nvml.is_open


@pytest.mark.parametrize("nvml", [None, FakeNvml(has_driver=False)])
def test_a_missing_driver_or_package_is_not_an_error(monkeypatch: pytest.MonkeyPatch, nvml: object, caplog: pytest.LogCaptureFixture) -> None:
    use(monkeypatch, nvml)
    with caplog.at_level("INFO"):
        assert read_telemetry() == ()
    assert caplog.text == ""


def test_a_driver_that_stops_answering_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(breaks=True)
    use(monkeypatch, nvml)
    assert read_telemetry() == ()
    assert "GPU is lost" in caplog.text and not nvml.is_open


def test_cards_are_matched_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml())
    cards = read_telemetry()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="11"))
    assert find_telemetry(torch.device("cuda", 0), cards) is cards[1]
    assert find_telemetry(torch.device("cpu"), cards) is None


@pytest.mark.gpu
def test_a_real_card_answers() -> None:
    card = find_telemetry(torch.device("cuda", 0), read_telemetry())
    assert card is not None and card.total_bytes >= torch.cuda.mem_get_info(0)[1] * 0.9
