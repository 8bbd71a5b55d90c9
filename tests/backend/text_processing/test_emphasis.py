from __future__ import annotations

import logging

import pytest
import torch

from backend.text_processing.emphasis import EMPHASIS_HELP, EMPHASIS_NAMES, apply_emphasis, resolve_emphasis_name


@pytest.fixture
def z_BLC() -> torch.Tensor:
    return torch.randn(3, 77, 8) + 0.5


@pytest.fixture
def weights_BL() -> torch.Tensor:
    weights = torch.ones(3, 77)
    weights[0, 2:5] = 1.4
    weights[1, 1:9] = 0.3
    return weights


@pytest.mark.parametrize("name", ["None", "Ignore"])
def test_modes_without_effect(name: str, z_BLC: torch.Tensor, weights_BL: torch.Tensor) -> None:
    assert torch.equal(apply_emphasis(name, z_BLC, weights_BL), z_BLC)


def test_no_norm_scales_each_token(z_BLC: torch.Tensor, weights_BL: torch.Tensor) -> None:
    assert torch.equal(apply_emphasis("No norm", z_BLC, weights_BL), z_BLC * weights_BL[:, :, None])


def test_original_restores_each_prompt_s_mean(z_BLC: torch.Tensor, weights_BL: torch.Tensor) -> None:
    result = apply_emphasis("Original", z_BLC, weights_BL)
    torch.testing.assert_close(result.mean(dim=(1, 2)), z_BLC.mean(dim=(1, 2)))
    scaled = z_BLC[0] * weights_BL[0, :, None]
    torch.testing.assert_close(result[0], scaled * (z_BLC[0].mean() / scaled.mean()))
    assert not torch.equal(result[0], z_BLC[0])


@pytest.mark.parametrize("name", EMPHASIS_NAMES)
def test_a_prompt_does_not_affect_other_prompts(name: str, z_BLC: torch.Tensor, weights_BL: torch.Tensor) -> None:
    together = apply_emphasis(name, z_BLC, weights_BL)
    alone = torch.cat([apply_emphasis(name, z_BLC[i : i + 1], weights_BL[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert torch.equal(together[2], z_BLC[2])


def test_a_mean_of_zero_does_not_blow_up() -> None:
    z_BLC = torch.tensor([[[1.0, -2.0], [3.0, 1.0]]])
    assert torch.isfinite(apply_emphasis("Original", z_BLC, torch.tensor([[4.0, 1.0]]))).all()


def test_names(caplog: pytest.LogCaptureFixture) -> None:
    assert [resolve_emphasis_name(name) for name in (" original", "NO NORM", "none", "Ignore")] == ["Original", "No norm", "None", "Ignore"]
    assert set(EMPHASIS_HELP) == set(EMPHASIS_NAMES)
    with caplog.at_level(logging.WARNING):
        assert resolve_emphasis_name("Loud") == "Original"
    assert "'Loud' is unknown" in caplog.text
