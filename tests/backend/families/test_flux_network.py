"""Flux.1's network: identification, names of weights, and the program. References: diffusers' FluxTransformer2DModel and its converter."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.checkpoint_layout import Layout
from backend.families.flux.identify import identify_flux, rope_widths
from backend.families.flux.key_map import flux_key_map
from backend.families.flux.program import FluxProgram, build_flux_program, pack, picture_ids, unpack
from backend.nn.program import Addition
from backend.state_dict import assign_tensors, build_empty, check_plan, plan_denoiser
from tests.support.flux_networks import WIDTH, make_flux, original_tensors

# files


def identify(tmp_path: Path, tensors: dict[str, Tensor]) -> Any:
    save_file(tensors, tmp_path / "model.safetensors")
    with open_tensor_file(tmp_path / "model.safetensors") as file:
        return identify_flux(file)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "dev"),
        ({"guidance_embeds": False}, "schnell"),
        ({"in_channels": 384, "out_channels": 64}, "fill"),
        ({"in_channels": 128, "out_channels": 64}, "control"),
    ],
)
def test_original_files_are_identified_by_names_and_shapes(tmp_path: Path, prefix: str, changes: dict[str, Any], kind: str) -> None:
    flux = make_flux(**changes)
    found_kind, found = identify(tmp_path, original_tensors(flux, prefix))
    assert (found_kind, found.part.prefix, found.part.layout, found.is_inpaint) == (kind, prefix, Layout.LDM, kind == "fill")
    assert found.takes_control_picture is (kind == "control")
    assert found.config == {name: flux.config[name] for name in found.config}


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
def test_diffusers_files_are_identified(tmp_path: Path, prefix: str) -> None:
    flux = make_flux()
    kind, found = identify(tmp_path, {prefix + key: tensor for key, tensor in flux.state_dict().items()})
    assert (kind, found.part.prefix, found.part.layout) == ("dev", prefix, Layout.DIFFUSERS)
    assert found.config == {name: flux.config[name] for name in found.config}


def test_the_published_head_gets_the_published_axes() -> None:
    assert rope_widths(128) == (16, 56, 56) and rope_widths(16) == (4, 6, 6)
    for width in range(8, 260, 2):
        assert sum(rope_widths(width)) == width and all(part % 2 == 0 and part > 0 for part in rope_widths(width))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_relatives_are_refused_by_name(tmp_path: Path, prefix: str) -> None:
    tensors = {**original_tensors(make_flux(), prefix), f"{prefix}early_stream_modulations.image.lin.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is Flux\.3.*not supported.*Flux\.1"):
        identify(tmp_path, tensors)


def test_other_files_are_ignored_or_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_flux())
    assert identify(tmp_path, {**tensors, "controlnet_blocks.0.weight": torch.zeros(2, 2)}) is None
    assert identify(tmp_path, {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.zeros(2, 2)}) is None
    assert identify(tmp_path, {"transformer_blocks.0.attn.norm_k.weight": torch.zeros(16)}) is None
    with pytest.raises(CheckpointError, match=r"lacks txt_in\.weight"):
        identify(tmp_path, {key: tensor for key, tensor in tensors.items() if key != "txt_in.weight"})
    with pytest.raises(CheckpointError, match="32 inputs per token"):
        identify(tmp_path, original_tensors(make_flux(in_channels=32, out_channels=64)))
    odd = {**tensors, "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(15)}
    with pytest.raises(CheckpointError, match="heads 15 wide"):
        identify(tmp_path, odd)


# names


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False}, {"num_single_layers": 0}])
def test_the_key_map_writes_original_files(changes: dict[str, Any]) -> None:
    flux = make_flux(**changes)
    wanted, made = original_tensors(flux), flux_key_map(flux).to_original(flux.state_dict())
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)


def test_the_library_s_converter_agrees_where_it_has_no_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter splits linear1 by the published width, which this test replaces."""
    flux = make_flux()
    source = convert_flux_transformer_checkpoint_to_diffusers.__code__
    constants = tuple({3072: WIDTH}.get(one, one) for one in source.co_consts)
    monkeypatch.setattr(convert_flux_transformer_checkpoint_to_diffusers, "__code__", source.replace(co_consts=constants))
    converted = convert_flux_transformer_checkpoint_to_diffusers(flux_key_map(flux).to_original(flux.state_dict()))
    own = flux.state_dict()
    assert converted.keys() == own.keys() and all(torch.equal(converted[key], own[key]) for key in own)


@pytest.mark.parametrize("layout", ["original", "weights for scales", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_file_is_loaded(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    flux = make_flux().to(dtype)
    tensors = dict(flux.state_dict()) if layout == "diffusers" else original_tensors(flux, "model.diffusion_model.")
    if layout == "weights for scales":
        tensors = {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_tensor_file(tmp_path / "model.safetensors") as file:
        found = identify_flux(file)
        assert found is not None
        network = build_empty(lambda: FluxTransformer2DModel(**found[1].config))
        plan = plan_denoiser(network, file, found[1].part, flux_key_map(network).places)
        check_plan(plan, file, "transformer")
        assert plan.unexpected == ()
        assign_tensors(network, plan, file, storage_dtype=dtype)
    own = flux.state_dict()
    assert all(torch.equal(tensor.view(torch.uint8), own[key].view(torch.uint8)) for key, tensor in network.state_dict().items())


# the program


def make_rows(
    flux: FluxTransformer2DModel, num_rows: int = 2, height: int = 8, width: int = 6, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    config = flux.config
    rows = {
        "x": torch.randn(num_rows, config.in_channels // 4, height, width, generator=generator),
        "context": torch.randn(num_rows, 7, config.joint_attention_dim, generator=generator),
        "y": torch.randn(num_rows, config.pooled_projection_dim, generator=generator),
    }
    rows = {name: tensor.to(dtype) for name, tensor in rows.items()}
    rows["timesteps"] = torch.rand(num_rows, generator=generator)
    if config.guidance_embeds:
        rows["guidance"] = torch.tensor([3.5, 1.25, 7.0])[:num_rows]
    return rows


def reference(flux: FluxTransformer2DModel, rows: dict[str, Tensor], **control: Any) -> Tensor:
    """The library's forward on packed latents; packing as its pipeline does it."""
    batch, channels, height, width = rows["x"].shape
    packed = rows["x"].view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)
    image_ids = torch.zeros(height // 2, width // 2, 3)
    image_ids[..., 1] += torch.arange(height // 2)[:, None]
    image_ids[..., 2] += torch.arange(width // 2)[None]
    (flow,) = flux(
        packed, rows["context"], rows["y"], rows["timesteps"], image_ids.reshape(-1, 3), torch.zeros(rows["context"].shape[1], 3),
        rows.get("guidance"), return_dict=False, **control,
    )  # fmt: skip
    return flow.view(batch, height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def run(program: FluxProgram, rows: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize(
    "changes", [{}, {"guidance_embeds": False}, {"in_channels": 384, "out_channels": 64}, {"num_single_layers": 0}, {"num_layers": 1}]
)
def test_the_fold_is_the_library_s_forward_bit_for_bit(changes: dict[str, Any]) -> None:
    flux = make_flux(**changes)
    rows = make_rows(flux)
    with torch.no_grad():
        wanted = reference(flux, rows)
    assert torch.equal(run(build_flux_program(deepcopy(flux)), rows), wanted)


def test_in_bfloat16_only_the_times_differ_from_the_library() -> None:
    """Times that bfloat16 represents exactly are the same, and then all results are."""
    flux = make_flux().to(torch.bfloat16)
    rows = make_rows(flux, dtype=torch.bfloat16)
    rows["timesteps"], rows["guidance"] = torch.tensor([0.5, 0.25]), torch.tensor([4.0, 4.0])
    with torch.no_grad():
        wanted = reference(flux, rows)
    assert (run(build_flux_program(deepcopy(flux)), rows) - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def test_missing_guidance_is_the_usual_one_and_missing_pooled_text_is_named() -> None:
    program, rows = build_flux_program(make_flux()), make_rows(make_flux())
    without = {name: tensor for name, tensor in rows.items() if name != "guidance"}
    assert torch.equal(run(program, without), run(program, {**rows, "guidance": torch.tensor([3.5, 3.5])}))
    with pytest.raises(ValueError, match=r"pooled text of CLIP-L.*\(batch, 64\)"):
        program.start({name: tensor for name, tensor in rows.items() if name != "y"})


def test_one_row_of_text_counts_for_all() -> None:
    program, rows = build_flux_program(make_flux()), make_rows(make_flux())
    shared = {name: tensor if name == "x" else tensor[:1] for name, tensor in rows.items()}
    repeated = {name: tensor if name == "x" else tensor[:1].expand(2, *tensor.shape[1:]) for name, tensor in rows.items()}
    torch.testing.assert_close(run(program, shared), run(program, repeated))


def test_residuals_are_added_where_the_library_adds_them() -> None:
    flux = make_flux()
    rows = make_rows(flux)
    generator = torch.Generator().manual_seed(6)
    double, single = ([torch.randn(2, 12, WIDTH, generator=generator) for _ in range(count)] for count in (2, 3))
    with torch.no_grad():
        wanted = reference(flux, rows, controlnet_block_samples=double, controlnet_single_block_samples=single)
    program = build_flux_program(deepcopy(flux))
    named = program.name_residuals({"input": double, "output": single})
    assert set(named) == {*(Addition("input", n, "image") for n in range(2)), *(Addition("output", n, "tokens") for n in range(3))}
    torch.testing.assert_close(run(program, rows, residuals=named), wanted)
    assert not torch.allclose(run(program, rows), wanted)
    assert list(program.name_residuals({"input": [None, double[1]]})) == [Addition("input", 1, "image")]


def test_a_cut_between_single_blocks_is_one_tensor() -> None:
    program = build_flux_program(make_flux())
    state = program.start(make_rows(make_flux()))
    for segment in program.segments[:4]:
        segment(state)
    assert set(state.tensors) == {"tokens", *program.constants}
    assert [segment.key for segment in program.segments] == [
        ("double_block", 0), ("double_block", 1), ("single_block", 0), ("single_block", 1), ("single_block", 2), ("last", 0),
    ]  # fmt: skip


def test_hooks_may_replace_a_block() -> None:
    program, rows = build_flux_program(make_flux()), make_rows(make_flux())
    seen = []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(sorted(args))
        return extra["original_block"](args)  # type: ignore[no-any-return]

    hooks = {"patches_replace": {"dit": {("double_block", 1): keep, ("single_block", 2): keep}}}
    assert torch.equal(run(program, rows, options=hooks), run(program, rows))
    common = ["attn_mask", "img", "pe", "transformer_options"]
    assert seen == [[*common, "txt", "vec"], [*common, "vec"]]
    hooks["patches_replace"]["dit"][("single_block", 2)] = lambda args, extra: {"img": args["img"]}
    assert not torch.equal(run(program, rows, options=hooks), run(program, rows))


def test_odd_sides_are_padded_and_cropped() -> None:
    x = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(x), 5, 7), x)
    assert pack(x).shape == (1, 12, 64)
    program, rows = build_flux_program(make_flux()), make_rows(make_flux(), height=5, width=7)
    assert run(program, rows).shape == (2, 16, 5, 7)
    assert picture_ids(2, 3, 1).tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]


def test_in_fp16_streams_are_fp32_and_do_not_overflow() -> None:
    """A block adds 1.8e5 to the stream: the library clips it at 65504, fp32 does not. Reference: the library in fp32."""
    flux = make_flux()
    block = flux.single_transformer_blocks[1]
    block.norm.linear.bias[2 * WIDTH :] = 6e4
    block.proj_out.bias.fill_(3.0)
    rows = make_rows(flux)
    with torch.no_grad():
        wanted = reference(flux, rows)
    program = build_flux_program(deepcopy(flux).to(torch.float16))
    state = program.start({name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in rows.items()})
    assert {state.tensors[name].dtype for name in ("image", "text")} == {torch.float32} and state.tensors["modulation"].dtype == torch.float16
    peak = 0.0
    with torch.no_grad():
        for segment in program.segments:
            segment(state)
            peak = max([peak, *(float(state.tensors[name].abs().max()) for name in ("image", "tokens") if name in state.tensors)])
    assert peak > torch.finfo(torch.float16).max
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.02 * wanted.abs().max()
