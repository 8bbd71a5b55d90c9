"""Forge's names for the parts of a UNet: they are the real layers, and what replaces their forward acts."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.attention import attention_function
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.nn import unet as forge
from backend.nn.layer_names import running
from backend.patcher.unet import UnetPatcher
from tests.support.checkpoints import build_models

SIGMA = torch.tensor([3.0])


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> KModel:
    return KModel(build_models(Path("none"), "sd15").unet, Prediction())


@pytest.fixture
def unet(model: KModel) -> Iterator[Any]:
    """Put back as it was afterwards."""
    yield model.diffusion_model
    for view in forge.replaced_views(model.diffusion_model).values():
        view.__dict__.pop("forward", None)
    for kind, forward in forge._OWN_FORWARD.items():
        kind.forward = forward  # type: ignore[method-assign]


def answer(model: KModel, options: dict[str, Any] | None = None) -> Tensor:
    text = drawn(2, 7, model.diffusion_model.config.cross_attention_dim, seed=2)
    base = {"cond_or_uncond": [1, 0], "sigmas": SIGMA, **(options or {})}
    return model.apply_model(drawn(2, 4, 8, 8), SIGMA.expand(2), c_crossattn=text, transformer_options=base)


def kinds(blocks: Any) -> list[list[str]]:
    return [[type(view).__name__ for view in block] for block in blocks]


def test_blocks_are_numbered_and_named_as_in_forge(unet: Any) -> None:
    assert kinds(unet.input_blocks) == [
        ["LayerView"],
        *(2 * [["ResBlock", "SpatialTransformer"]] + [["Downsample"]]) * 3,
        *2 * [["ResBlock"]],
    ]
    assert kinds([unet.middle_block]) == [["ResBlock", "SpatialTransformer", "ResBlock"]]
    assert kinds(unet.output_blocks)[2:6] == [
        ["ResBlock", "Upsample"],
        *2 * [["ResBlock", "SpatialTransformer"]],
        ["ResBlock", "SpatialTransformer", "Upsample"],
    ]
    assert len(unet.output_blocks) == 12
    block = unet.input_blocks[4][1].transformer_blocks[0]
    assert isinstance(block, forge.BasicTransformerBlock) and isinstance(block.attn2, forge.CrossAttention)
    attention = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    assert block.attn2.to_k is attention.to_k and block.attn2.heads == attention.heads
    assert block.attn2.dim_head * block.attn2.heads == attention.to_q.out_features
    with pytest.raises(AttributeError, match="cannot be replaced, because a plan may cut it"):
        unet.input_blocks[1].forward = len


@pytest.mark.parametrize(
    "place", ["ResBlock", "SpatialTransformer", "BasicTransformerBlock", "CrossAttention", "Downsample", "Upsample", "LayerView"]
)
def test_a_replacement_that_calls_what_it_replaced_changes_nothing(model: KModel, unet: Any, place: str) -> None:
    plain, calls = answer(model), []
    every = [view for block in (*unet.input_blocks, unet.middle_block, *unet.output_blocks) for outer in block for view in outer.walk()]
    for view in (one for one in every if type(one).__name__ == place):

        def replaced(*args: Any, before: Any = view.forward, name: str = view.name, **kwargs: Any) -> Tensor:
            calls.append(name)
            result: Tensor = before(*args, **kwargs)
            return result

        view.forward = replaced
    assert torch.allclose(answer(model), plain, atol=1e-5)
    assert sorted(calls) == sorted(view.name for view in every if type(view).__name__ == place)


def test_a_replaced_attention_acts_like_the_patchers_hook(model: KModel, unet: Any) -> None:
    view = unet.input_blocks[4][1].transformer_blocks[0].attn2

    def halved(x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **kwargs: Any) -> Tensor:
        q, k, v = view.to_q(x), view.to_k(context), view.to_v(context)
        return view.to_out(attention_function(q, k, v * 0.5, view.heads))

    patcher = UnetPatcher.from_model(model)
    patcher.set_model_attn2_replace(lambda q, k, v, extra: attention_function(q, k, v * 0.5, extra["n_heads"]), "input", 4, 0)
    expected = answer(model, patcher.model_options["transformer_options"])
    plain = answer(model)
    view.forward = halved
    assert torch.equal(answer(model), expected) and not torch.equal(expected, plain)
    view.forward = type(view).forward.__get__(view)
    assert torch.equal(answer(model), plain) and not forge.replaced_views(unet)
    view.forward = halved
    del view.forward
    assert torch.equal(answer(model), plain)


def test_a_class_is_patched_for_all_its_layers(model: KModel, unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, before, seen = answer(model), forge.CrossAttention.forward, set()

    def patched(self: Any, x: Tensor, context: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        seen.add(self.name)
        return before(self, x, context, *args, **kwargs) * 0.9

    monkeypatch.setattr(forge.CrossAttention, "forward", patched)
    assert not torch.equal(answer(model), plain)
    assert len(seen) == 2 * 16, "self- and cross-attention of 16 blocks"
    monkeypatch.undo()
    assert torch.equal(answer(model), plain)


def test_while_a_hook_runs_views_show_the_copy_it_runs_for(model: KModel, unet: Any) -> None:
    copy = model.make_empty().diffusion_model
    view = unet.middle_block[1].transformer_blocks[0].attn1
    assert view.to_q is unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    with running(copy.mid_block.resnets[0]):
        assert view.to_q is copy.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert copy.middle_block[1] is not unet.middle_block[1]
    assert deepcopy(unet).input_blocks is not None


def test_what_cannot_act_everywhere_is_named(unet: Any) -> None:
    assert forge.find_forward_binding(unet) is None
    unet.input_blocks[1][1].forward = print
    assert "SpatialTransformer(down_blocks.0.attentions.0), which must run whole" in str(forge.find_forward_binding(unet))
    del unet.input_blocks[1][1].forward
    layer: nn.Module = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.forward = layer.forward  # type: ignore[method-assign]
    try:
        assert "forward of the layer mid_block.attentions.0.transformer_blocks.0.attn1 itself" in str(forge.find_forward_binding(unet))
    finally:
        del layer.forward


def test_the_forward_of_a_real_layer_acts_beside_hooks_too(model: KModel, unet: Any) -> None:
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    before = layer.forward
    for options in ({}, {"patches": {"attn1_output_patch": [lambda output, extra: output]}}):
        plain = answer(model, options)
        layer.forward = lambda *args, **kwargs: before(*args, **kwargs) * 0.5
        try:
            assert not torch.allclose(answer(model, options), plain, atol=1e-4)
        finally:
            del layer.forward
