"""Resizing of tensors: sizes, constants, and the formula of bislerp."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from backend.misc.image_resize import adaptive_resize, bislerp

METHODS = ("bicubic", "nearest-exact", "bilinear", "area", "bislerp", "lanczos")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resizes_and_keeps_what_is_constant(method: str) -> None:
    flat = torch.tensor([0.5, -2.0, 3.0]).view(1, 3, 1, 1).expand(2, 3, 8, 6)
    smaller = adaptive_resize(flat, 4, 3, method, "disabled")
    assert smaller.shape == (2, 3, 3, 4)
    assert torch.allclose(smaller, flat[..., :3, :4], atol=1e-5)
    assert adaptive_resize(flat, 0, 0, method, "disabled").shape == (2, 3, 1, 1)


def test_bislerp_turns_directions_and_interpolates_lengths() -> None:
    two = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)  # (1, 0) and (0, 3)
    four = bislerp(two, 4, 1)
    for column, share in ((1, 0.25), (2, 0.75)):
        angle, length = share * math.pi / 2, 1 + 2 * share
        expected = torch.tensor([length * math.cos(angle), length * math.sin(angle)])
        assert torch.allclose(four[0, :, 0, column], expected, atol=1e-5)
    assert torch.equal(bislerp(two, 2, 1), two)
    opposite = torch.tensor([[1.0, -1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    assert torch.isfinite(bislerp(opposite, 5, 1)).all()


def test_the_middle_is_cut_to_the_new_ratio() -> None:
    x = torch.randn(1, 2, 8, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(adaptive_resize(x, 4, 4, "area", "center"), functional.avg_pool2d(x[..., 2:10], 2))
