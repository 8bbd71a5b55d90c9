"""The T5 encoder against transformers': in full precision, and in half precision and fp8, where transformers' fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from backend.nn.t5 import T5Shape, T5TextEncoder, t5_config
from backend.storage.running import set_types
from tests.support.t5_encoders import HEAD_WIDTH, INNER_WIDTH, NUM_HEADS, NUM_LAYERS, WIDTH, t5_encoder

IDS = torch.tensor([[5, 900, 17, 1, 0, 0, 0], [30000, 4, 4, 4, 4, 4, 1]])
SHAPE = T5Shape(
    vocab_length=32128, width=WIDTH, inner_width=INNER_WIDTH, num_heads=NUM_HEADS, head_width=HEAD_WIDTH, num_layers=NUM_LAYERS, num_buckets=32
)  # fmt: skip


def ours(reference: Any) -> T5TextEncoder:
    encoder = T5TextEncoder(t5_config(SHAPE)).eval().requires_grad_(False)
    weights = {key: value for key, value in reference.state_dict().items() if key != "shared.weight"}
    assert set(encoder.state_dict()) == set(weights)
    encoder.load_state_dict(weights)
    return encoder


def run(encoder: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return encoder(ids).last_hidden_state.float()


def test_in_full_precision_it_is_transformers() -> None:
    torch.testing.assert_close(run(ours(t5_encoder())), run(t5_encoder()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_stays_near(dtype: torch.dtype) -> None:
    half = ours(t5_encoder()).to(dtype)
    expected = run(t5_encoder())
    error = (run(half) - expected).abs().mean() / expected.abs().mean()
    assert error < (0.01 if dtype is torch.float16 else 0.08)


def _loud() -> Any:
    """Gated products and a residual stream beyond 65504, as in T5-XXL."""
    encoder = copy.deepcopy(t5_encoder())
    for block in encoder.encoder.block:
        dense = block.layer[-1].DenseReluDense
        dense.wi_0.weight.mul_(150.0)
        dense.wi_1.weight.mul_(150.0)
    return encoder


def test_products_beyond_fp16_stay_finite_and_right() -> None:
    loud = _loud()
    expected = run(loud)
    naive = copy.deepcopy(loud).half()
    assert (
        not run(naive).isfinite().all() or (run(naive) - expected).abs().mean() > 0.1 * expected.abs().mean()
    )  # transformers' encoder really overflows
    given = run(ours(loud).half())
    assert (given - expected).abs().mean() < 0.01 * expected.abs().mean()


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float16])
def test_weights_stored_small_do_not_drag_the_activations_down(stored: torch.dtype) -> None:
    """Transformers casts activations to the dtype of `wo`'s weight, which would destroy them in fp8."""
    rounded = copy.deepcopy(t5_encoder())
    for name, parameter in rounded.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.to(stored).float()
    small = ours(rounded)
    set_types(small, stored, torch.float32)
    assert small.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is stored
    torch.testing.assert_close(run(small), run(rounded))
