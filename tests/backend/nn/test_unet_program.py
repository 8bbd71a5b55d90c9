"""The program of segments. Reference: the forward of diffusers' UNet2DConditionModel, unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from backend.attention import attention_pytorch
from backend.nn.unet_program import build_program
from tests.support.checkpoints import DISTILLED, SDXL_PROJECTION_DIM, build_models
from tools.demo_model import networks

CASES = ("sd15", "sd15-inpaint", "sd21_v", "sdxl", "sdxl-inpaint", "refiner", "no_middle_attention", *DISTILLED, "demo")


@pytest.fixture(scope="module", params=CASES)
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    if request.param == "demo":
        torch.manual_seed(1)
        return networks.build_unet().eval().requires_grad_(False)
    if request.param in ("refiner", "no_middle_attention"):
        return _build_relative(request.param)
    if request.param in DISTILLED:
        return build_models(Path("none"), request.param).unet
    family, _, inpaint = request.param.partition("-")
    return build_models(Path("none"), family, inpaint=bool(inpaint)).unet


def _build_relative(name: str) -> UNet2DConditionModel:
    """The SDXL refiner's shape (four levels, transformers in the two middle ones), and a reduced SDXL's (no attention in the middle block)."""
    torch.manual_seed(1)
    is_refiner = name == "refiner"
    network = UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128) if is_refiner else (32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")[: 4 if is_refiner else 3],
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")[0 if is_refiner else 1 :],
        mid_block_type="UNetMidBlock2DCrossAttn" if is_refiner else "UNetMidBlock2D",
        transformer_layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + SDXL_PROJECTION_DIM,
    )
    return network.eval().requires_grad_(False)


def _inputs(unet: UNet2DConditionModel, *, height: int = 16, width: int = 16, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, unet.config.in_channels, height, width, generator=generator),
        "timestep": torch.linspace(980.25, 10.5, batch),
        "encoder_hidden_states": torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type == "text_time":
        time_ids = torch.tensor([[64.0, 64, 0, 8, 64, 96]]).expand(batch, 6)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, SDXL_PROJECTION_DIM, generator=generator), "time_ids": time_ids}
    return inputs


def _vector(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> Tensor | None:
    """SDXL's pooled text and embedded sizes as one vector."""
    added = inputs.get("added_cond_kwargs")
    if added is None:
        return None
    sizes = unet.add_time_proj(added["time_ids"].flatten()).reshape(added["text_embeds"].shape[0], -1)
    return torch.cat([added["text_embeds"], sizes], dim=-1)


def _rows(unet: UNet2DConditionModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    vector = _vector(unet, inputs)
    rows = {"x": inputs["sample"], "timesteps": inputs["timestep"], "context": inputs["encoder_hidden_states"]}
    return rows if vector is None else {**rows, "y": vector}


def _run(unet: UNet2DConditionModel, inputs: dict[str, Any], *, control: Any = None, options: dict[str, Any] | None = None) -> Tensor:
    program = build_program(unet)
    with torch.no_grad():
        return program.run(program.start(_rows(unet, inputs), residuals=program.name_residuals(control), options=options))


def _library(unet: UNet2DConditionModel, inputs: dict[str, Any], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return unet(**inputs, **kwargs).sample


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (9, 13)], ids=str)
def test_the_fold_is_the_librarys_forward_bit_for_bit(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    inputs = _inputs(unet, height=size[0], width=size[1])
    assert torch.equal(_run(unet, inputs), _library(unet, inputs))


def test_it_is_bit_equal_in_bf16(unet: UNet2DConditionModel) -> None:
    half = copy.deepcopy(unet).to(torch.bfloat16)
    inputs = _inputs(unet)
    inputs["sample"], inputs["encoder_hidden_states"] = inputs["sample"].bfloat16(), inputs["encoder_hidden_states"].bfloat16()
    if "added_cond_kwargs" in inputs:
        inputs["added_cond_kwargs"]["text_embeds"] = inputs["added_cond_kwargs"]["text_embeds"].bfloat16()
    assert torch.equal(_run(half, inputs), _library(half, inputs))


@pytest.mark.parametrize(
    ("family", "num_inputs", "with_transformer", "upsampled"),
    [("sd15", 12, {1, 2, 4, 5, 7, 8}, {2, 5, 8}), ("sdxl", 9, {4, 5, 7, 8}, {2, 5})],
)
def test_segments_are_numbered_as_forge_numbers_blocks(family: str, num_inputs: int, with_transformer: set[int], upsampled: set[int]) -> None:
    program = build_program(build_models(Path("none"), family).unet)
    keys = [segment.key for segment in program.segments]
    assert keys == [("input", n) for n in range(num_inputs)] + [("middle", 0)] + [("output", n) for n in range(num_inputs)] + [("last", 0)]
    assert {n for n in range(num_inputs) if any("attentions" in name for name, _ in program.segment("input", n).named_layers)} == with_transformer
    assert {n for n in range(num_inputs) if any("upsamplers" in name for name, _ in program.segment("output", n).named_layers)} == upsampled
    assert program.skip_source(0) == num_inputs - 1
    with pytest.raises(KeyError, match="no segment input 99"):
        program.segment("input", 99)


def test_every_parameter_belongs_to_exactly_one_segment_under_its_own_name(unet: UNet2DConditionModel) -> None:
    program = build_program(unet)
    owned = [name for part in (program.embedding, *program.segments) for name, _ in part.named_parameters()]
    assert sorted(owned) == sorted(name for name, _ in unet.named_parameters())
    assert sum(segment.parameter_bytes() for segment in program.segments) < sum(p.nbytes for p in unet.parameters())


def test_control_residuals_are_added_as_the_library_adds_them(unet: UNet2DConditionModel) -> None:
    inputs = _inputs(unet)
    shapes: list[torch.Size] = []
    _run(unet, inputs, options={"patches": {"output_block_patch": [lambda h, skip, options: (shapes.append(skip.shape), (h, skip))[1]]}})
    shapes.reverse()
    generator = torch.Generator().manual_seed(5)
    down = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    middle = torch.randn(shapes[-1], generator=generator) * 0.1
    control = {"output": down, "middle": [middle], "input": []}
    added = middle if unet.mid_block is not None else torch.zeros_like(middle)  # without a middle block nothing takes it
    expected = _library(unet, inputs, down_block_additional_residuals=down, mid_block_additional_residual=added)
    assert torch.equal(_run(unet, inputs, control=control), expected)
    assert len(control["output"]) == len(shapes), "the caller's lists are left alone"


def test_input_residuals_act_before_the_skip_is_stored(unet: UNet2DConditionModel) -> None:
    """As a T2I-Adapter does: a residual of ones at input 0 equals a bias in conv_in that is larger by one."""
    inputs = _inputs(unet)
    ones = torch.ones(2, unet.config.block_out_channels[0], 16, 16)
    biased = copy.deepcopy(unet)
    biased.conv_in.bias += 1.0
    torch.testing.assert_close(_run(unet, inputs, control={"input": [ones]}), _library(biased, inputs), rtol=1e-4, atol=1e-5)


def test_a_residual_that_does_not_fit_is_left_out_with_a_warning(unet: UNet2DConditionModel, caplog: pytest.LogCaptureFixture) -> None:
    inputs = _inputs(unet)
    output = _run(unet, inputs, control={"input" if unet.mid_block is None else "middle": [torch.ones(2, 7, 3, 3)]})
    assert torch.equal(output, _library(unet, inputs))
    assert "does not fit" in caplog.text


def test_block_hooks_see_every_block_in_order(unet: UNet2DConditionModel) -> None:
    seen: list[tuple[str, tuple[str, int]]] = []

    def modify(hidden: Tensor, when: str, options: dict[str, Any]) -> Tensor:
        seen.append((when, options["block"]))
        return hidden

    inputs = _inputs(unet)
    output = _run(unet, inputs, options={"block_modifiers": [modify]})
    keys = [segment.key for segment in build_program(unet).segments]
    assert seen == [(when, key) for key in keys for when in ("before", "after")]
    assert torch.equal(output, _library(unet, inputs))


def test_block_hooks_change_the_result(unet: UNet2DConditionModel) -> None:
    inputs = _inputs(unet)
    plain = _library(unet, inputs)
    doubling = {"block_modifiers": [lambda h, when, options: h * 2 if (when, options["block"]) == ("after", ("last", 0)) else h]}
    assert torch.equal(_run(unet, inputs, options=doubling), plain * 2)
    for name, patch in {
        "input_block_patch": lambda h, options: h * 1.1,
        "input_block_patch_after_skip": lambda h, options: h * 1.1,
        "output_block_patch": lambda h, skip, options: (h, skip * 1.1),
    }.items():
        assert not torch.allclose(_run(unet, inputs, options={"patches": {name: [patch]}}), plain), name


def test_the_patch_after_the_skip_does_not_touch_the_skip() -> None:
    unet = build_models(Path("none"), "sd15").unet
    inputs, skips = _inputs(unet), []
    plain_skips: list[Tensor] = []
    watch = {"output_block_patch": [lambda h, skip, options: (plain_skips.append(skip), (h, skip))[1]]}
    _run(unet, inputs, options={"patches": watch})
    only_last = [lambda h, options: h * 0 if options["block"] == ("input", 11) else h]
    watched = {"output_block_patch": [lambda h, skip, options: (skips.append(skip), (h, skip))[1]], "input_block_patch_after_skip": only_last}
    _run(unet, inputs, options={"patches": watched})
    assert all(torch.equal(a, b) for a, b in zip(skips, plain_skips))


def test_inner_modifiers_see_the_layers_of_a_block() -> None:
    unet = build_models(Path("none"), "sd15").unet
    seen: list[tuple[Any, ...]] = []

    def modify(hidden: Tensor, when: str, layer: Any, index: int, layers: Any, options: dict[str, Any]) -> Tensor:
        seen.append((when, type(layer).__name__, index, options["block"]))
        return hidden

    inputs = _inputs(unet)
    assert torch.equal(_run(unet, inputs, options={"block_inner_modifiers": [modify]}), _library(unet, inputs))
    assert ("before", "Transformer2DModel", 1, ("input", 1)) in seen
    assert ("after", "Upsample2D", 1, ("output", 2)) in seen


def test_options_tell_hooks_where_they_are() -> None:
    unet = build_models(Path("none"), "sdxl").unet
    inputs, seen = _inputs(unet), []
    patch = lambda n, context, value, extra: (seen.append(extra), (n, context, value))[1]  # noqa: E731
    options = {"patches": {"attn2_patch": [patch]}, "sigmas": "kept"}
    _run(unet, inputs, options=options)
    first = seen[0]
    assert first["block"] == ("input", 4)
    assert first["original_shape"] == [2, 4, 16, 16]
    assert first["n_heads"] * first["dim_head"] == 64
    assert first["sigmas"] == "kept"
    assert "patches" not in first
    assert [extra["block_index"] for extra in seen[:2]] == [0, 1]
    assert list(dict.fromkeys(extra["transformer_index"] for extra in seen)) == list(range(11))
    assert "block" not in options, "the caller's options are left alone"


def _identity_attention(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
    return attention_pytorch(q, k, v, extra["n_heads"])


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"attn1_patch": [lambda n, context, value, extra: (n, context, value)]}},
        {"patches": {"attn2_patch": [lambda n, context, value, extra: (n, context, value)]}},
        {"patches": {"attn1_output_patch": [lambda n, extra: n], "attn2_output_patch": [lambda n, extra: n], "middle_patch": [lambda x, extra: x]}},
        {"patches_replace": {"attn1": {("middle", 0): _identity_attention}, "attn2": {("output", 3, 0): _identity_attention}}},
        {"group_norm_wrapper": lambda norm, x, options: norm(x)},
        {"groupnorm_wrapper": lambda norm, x, options: norm(x)},
    ],
    ids=["attn1_patch", "attn2_patch", "output_patches", "replace", "group_norm", "groupnorm"],
)
def test_hooks_that_do_nothing_leave_the_result_bit_equal(unet: UNet2DConditionModel, options: dict[str, Any]) -> None:
    inputs = _inputs(unet)
    assert torch.equal(_run(unet, inputs, options=options), _library(unet, inputs))


def test_a_replacement_for_one_block_index_acts_there_only() -> None:
    unet = build_models(Path("none"), "sdxl").unet
    seen: list[tuple[Any, ...]] = []

    def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        seen.append((*extra["block"], extra["block_index"]))
        return torch.zeros_like(q)

    inputs = _inputs(unet)
    changed = _run(unet, inputs, options={"patches_replace": {"attn1": {("middle", 0, 2): replace}}})
    assert seen == [("middle", 0, 2)]
    assert not torch.equal(changed, _library(unet, inputs))


def test_an_attention_patch_may_change_keys_and_values_separately() -> None:
    unet = build_models(Path("none"), "sd15").unet
    inputs = _inputs(unet)
    swapped = _run(unet, inputs, options={"patches": {"attn2_patch": [lambda n, context, value, extra: (n, context.roll(1, 1), value.roll(1, 1))]}})
    torch.testing.assert_close(swapped, _library(unet, inputs), rtol=1e-4, atol=1e-4)  # a set of (key, value) pairs has no order
    torn = _run(unet, inputs, options={"patches": {"attn2_patch": [lambda n, context, value, extra: (n, context, value.roll(1, 1))]}})
    assert not torch.allclose(torn, swapped, atol=1e-4)


def test_an_sdxl_network_without_its_vector_says_so() -> None:
    unet = build_models(Path("none"), "sdxl").unet
    inputs = _inputs(unet)
    with pytest.raises(ValueError, match="pooled text and sizes"):
        build_program(unet).start({"x": inputs["sample"], "timesteps": inputs["timestep"], "context": inputs["encoder_hidden_states"]})


def test_a_network_of_another_kind_is_refused_with_its_parts_named() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(32, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, layers_per_block=1, cross_attention_dim=32,
    )  # fmt: skip
    with pytest.raises(ValueError, match="AttnDownBlock2D, AttnUpBlock2D"):
        build_program(unet)


# pieces


def _run_pieces(unet: UNet2DConditionModel, inputs: dict[str, Any], options: dict[str, Any] | None = None) -> Tensor:
    program = build_program(unet)
    state = program.start(_rows(unet, inputs), options=options)
    for piece in program.finest_pieces():
        program.run_piece(piece, state)
    return state.hidden_BCHW


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 19)])
def test_pieces_at_every_transformer_block_equal_the_whole_bit_for_bit(unet: UNet2DConditionModel, height: int, width: int) -> None:
    inputs = _inputs(unet, height=height, width=width)
    assert torch.equal(_run_pieces(unet, inputs), _library(unet, inputs))


@torch.no_grad()
def test_pieces_call_hooks_as_often_as_the_whole(unet: UNet2DConditionModel) -> None:
    inputs = _inputs(unet)

    def count(run: Callable[[dict[str, Any]], object]) -> list[tuple[object, ...]]:
        seen: list[tuple[object, ...]] = []

        def block_hook(h: Tensor, when: str, options: dict[str, Any]) -> Tensor:
            seen.append((when, options["block"], tuple(h.shape)))
            return h

        def inner_hook(h: Tensor, when: str, layer: object, index: int, layers: object, options: dict[str, Any]) -> Tensor:
            seen.append((when, options["block"], index))
            return h

        def attention_hook(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            seen.append((extra["block"], extra["block_index"], extra["transformer_index"]))
            return q, k, v

        run({"block_modifiers": [block_hook], "block_inner_modifiers": [inner_hook], "patches": {"attn1_patch": [attention_hook]}})
        return seen

    whole = count(lambda options: _run(unet, inputs, options=options))
    assert whole
    assert count(lambda options: _run_pieces(unet, inputs, options)) == whole


def test_pieces_have_every_weight_once(unet: UNet2DConditionModel) -> None:
    program = build_program(unet)
    held = [
        f"{name}.{key}" for piece in program.finest_pieces() for name, layer in program.piece_layers(piece) for key, _ in layer.named_parameters()
    ]
    embedding = [name for name, _ in program.embedding.named_parameters()]
    assert sorted(held + embedding) == sorted(name for name, _ in unet.named_parameters())
    assert len(held) == len(set(held))
