"""Every attention against a plain softmax. Reference for layers: diffusers' attention layer with its own processor."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from backend import attention
from backend.args import BackendConfig

FUNCTIONS = (attention.attention_pytorch, attention.attention_basic, attention.attention_split, attention.attention_sub_quad)


@pytest.fixture(autouse=True)
def _default_choice() -> None:
    attention.configure_attention(BackendConfig())
    yield
    attention.configure_attention(BackendConfig())


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.zeros_like(q)
    size = q.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.einsum("blk,bmk->blm", q[..., part].double(), k[..., part].double()) / size**0.5
        scores = scores if bias is None else scores + bias.double()
        out[..., part] = torch.einsum("blm,bmk->blk", scores.softmax(-1), v[..., part].double()).float()
    return out


def _tensors(num_keys: int = 77) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 600, 32), torch.randn(2, num_keys, 32), torch.randn(2, num_keys, 32)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_is_softmax_attention(function: attention.AttentionFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT_SCORE_BYTES", 77 * 4 * 4 * 2 * 100)
    monkeypatch.setattr(attention, "SUB_QUAD_KEY_CHUNK", 32)
    q, k, v = _tensors()
    torch.testing.assert_close(function(q, k, v, 4), _reference(q, k, v, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", ["rows", "all", "bool"])
def test_masks(function: attention.AttentionFunction, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SPLIT_SCORE_BYTES", 77 * 4 * 4 * 2 * 100)
    monkeypatch.setattr(attention, "SUB_QUAD_KEY_CHUNK", 32)
    q, k, v = _tensors()
    bias = torch.randn(2, 600 if kind == "rows" else 1, 77)
    mask = bias
    if kind == "bool":
        mask = bias > -0.5
        bias = torch.zeros_like(bias).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(function(q, k, v, 4, mask), _reference(q, k, v, 4, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_heads_that_are_split_already(function: attention.AttentionFunction) -> None:
    q, k, v = _tensors()
    split = [x.view(2, -1, 4, 8).transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(function(*split, 4, skip_reshape=True), function(q, k, v, 4))


def test_scores_in_fp32_are_closer_for_half_inputs() -> None:
    q, k, v = (x.half() * 4 for x in _tensors())
    exact = _reference(q.float(), k.float(), v.float(), 4)
    error = (attention.attention_basic(q, k, v, 4).float() - exact).abs().mean()
    assert (attention.attention_basic(q, k, v, 4, attn_precision=torch.float32).float() - exact).abs().mean() < error


@pytest.mark.parametrize("name", ["pytorch", "normal", "slice"])
def test_single_head_over_a_picture(name: str) -> None:
    q, k, v = (torch.randn(2, 16, 6, 5) for _ in range(3))
    flat = [x.flatten(2).transpose(1, 2) for x in (q, k, v)]
    expected = _reference(*flat, 1).transpose(1, 2).reshape(q.shape)
    function = getattr(attention, f"{name}_attention_single_head_spatial")
    torch.testing.assert_close(function(q, k, v), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", ["auto", "pytorch", "split", "quad"])
def test_the_flag_chooses(flag: str) -> None:
    q, k, v = _tensors()
    assert attention.configure_attention(BackendConfig(attention=flag)) == ("pytorch" if flag == "auto" else flag)
    torch.testing.assert_close(attention.attention_function(q, k, v, 4), _reference(q, k, v, 4), rtol=1e-5, atol=1e-5)


def test_xformers_is_replaced_with_a_warning_if_it_cannot_run(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("xformers may well run here")
    assert attention.configure_attention(BackendConfig(attention="xformers")) == "pytorch"
    assert "xformers" in caplog.text


def test_precision_flags() -> None:
    assert attention.get_attn_precision() == torch.float32
    attention.configure_attention(BackendConfig(disable_attention_upcast=True))
    assert attention.get_attn_precision() is None
    attention.configure_attention(BackendConfig(force_upcast_attention=True))
    assert attention.get_attn_precision(torch.float16) == torch.float32


@pytest.mark.parametrize("spatial", [False, True])
def test_the_processor_equals_diffusers(spatial: bool) -> None:
    layer = Attention(
        32, heads=4, dim_head=8, norm_num_groups=8 if spatial else None, residual_connection=spatial, bias=True, rescale_output_factor=2.0
    )
    x = torch.randn(2, 32, 6, 5) if spatial else torch.randn(2, 30, 32)
    context = None if spatial else torch.randn(2, 7, 32)
    with torch.no_grad():
        expected = layer(x, encoder_hidden_states=context)
        layer.set_processor(attention.AttentionProcessorForge())
        attention.configure_attention(BackendConfig(attention="split"))
        torch.testing.assert_close(layer(x, encoder_hidden_states=context), expected, rtol=1e-5, atol=1e-5)
