from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backend.args import BackendConfig
from backend.devices.determinism import apply_determinism


@pytest.fixture(autouse=True)
def algorithms_as_before() -> Iterator[None]:
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("wanted", [True, False])
def test_the_flag_is_passed_to_torch(wanted: bool) -> None:
    torch.use_deterministic_algorithms(False)
    apply_determinism(BackendConfig(deterministic=wanted))
    assert torch.are_deterministic_algorithms_enabled() is wanted
