"""Fixtures of the tests of whole pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.flow_pictures import cpu_engine


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """The CPU as the only device."""
    with cpu_engine():
        yield
