"""The layer in which a network's numbers end is found by running it again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backend.nn.nan_search import LayerNansError, check_finite, find_nan_layer
from tests.support.flux_networks import make_flux


def run_flux(flux: nn.Module) -> torch.Tensor:
    numbers = torch.randn(1, 4, 64), torch.randn(1, 3, 32), torch.randn(1, 64), torch.tensor([0.5])
    (flow,) = flux(*numbers, torch.zeros(4, 3), torch.zeros(3, 3), torch.tensor([3.5]), return_dict=False)
    return flow


def test_the_first_layer_is_named() -> None:
    flux = make_flux()
    check_finite(flux, run_flux(flux), lambda: run_flux(flux))
    flux.single_transformer_blocks[1].attn.to_k.weight[3, 3] = float("inf")
    flux.single_transformer_blocks[2].proj_out.weight.fill_(float("nan"))
    output = run_flux(flux)
    assert find_nan_layer(flux, lambda: run_flux(flux)) == "single_transformer_blocks.1.attn.to_k"
    with pytest.raises(LayerNansError, match=r"layer single_transformer_blocks\.1\.attn\.to_k is the first.*--all-in-fp32"):
        check_finite(flux, output, lambda: run_flux(flux))
    assert not any(layer._forward_hooks for layer in flux.modules())


def test_numbers_that_are_well_the_second_time_are_said_to_be() -> None:
    flux = make_flux()
    with pytest.raises(LayerNansError, match="no single layer gave them"):
        check_finite(flux, torch.tensor([float("nan")]), lambda: run_flux(flux))
