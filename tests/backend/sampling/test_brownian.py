"""Brownian paths against torchsde's tree, which made users' old pictures."""

from __future__ import annotations

import pytest
import torch
import torchsde

from backend.sampling.brownian import BrownianPath

SHAPE = (4, 3, 2)
LOW, HIGH = 0.0291675, 14.614647


def _randn(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entropy", [0, 1, 123456789, 2**63 + 5])
def test_it_is_torchsdes_tree_bit_for_bit(entropy: int) -> None:
    tree = torchsde.BrownianTree(LOW, torch.zeros(SHAPE), HIGH, entropy=entropy)
    path = BrownianPath(LOW, HIGH, entropy, _randn)
    levels = torch.linspace(HIGH**0.3, LOW**0.3, 12) ** (1 / 0.3)
    for high, low in zip(levels.tolist(), levels.tolist()[1:]):
        low, high = max(low, LOW), min(high, HIGH)
        assert torch.equal(path.increment(low, high), tree(low, high)), (low, high)
    assert torch.equal(path.increment(LOW, HIGH), tree(LOW, HIGH))
    assert torch.equal(path.increment(1.0, 1.00001), tree(1.0, 1.00001))


def test_increments_add_up_in_any_order_of_requests() -> None:
    forward, backward = BrownianPath(0.0, 10.0, 5, _randn), BrownianPath(0.0, 10.0, 5, _randn)
    first = [forward.increment(0.0, 1.25), forward.increment(1.25, 7.3), forward.increment(0.0, 7.3)]
    second = [backward.increment(0.0, 7.3), backward.increment(1.25, 7.3), backward.increment(0.0, 1.25)]
    torch.testing.assert_close(first[0] + first[1], first[2], rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(second)))


def test_increments_have_the_variance_of_their_length() -> None:
    path = BrownianPath(0.0, 8.0, 1, lambda seed: torch.randn(200_000, generator=torch.Generator().manual_seed(seed)))
    increments = [path.increment(start, stop) for start, stop in ((0.0, 3.0), (3.0, 3.5), (3.5, 8.0))]
    for increment, length in zip(increments, (3.0, 0.5, 4.5)):
        assert float(increment.var()) == pytest.approx(length, rel=0.02)
    assert abs(float((increments[0] * increments[2]).mean())) < 0.05


def test_levels_outside_count_as_the_ends() -> None:
    path = BrownianPath(1.0, 2.0, 1, _randn)
    assert torch.equal(path.increment(0.0, 5.0), path.increment(1.0, 2.0))
    assert torch.equal(path.increment(3.0, 5.0), torch.zeros(SHAPE))


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 2\.0 to 2\.0"):
        BrownianPath(2.0, 2.0, 1, _randn)
