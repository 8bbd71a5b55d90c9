"""Qwen-Image's files, names, network, VAE and LoRAs. References: diffusers' QwenImageTransformer2DModel, AutoencoderKLQwenImage and converter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.checkpoint_layout import Layout, Part
from backend.families.qwen_vae import LATENT, find_qwen_vae, original_name, plan_qwen_vae, qwen_vae
from backend.families.qwenimage import FAMILY
from backend.families.qwenimage.guidance import keep_flow_length
from backend.families.qwenimage.program import build_qwen_program, place_tokens
from backend.families.qwenimage.text import is_first_edit
from backend.nn.padded_text import TEXT_LENGTHS
from backend.nn.qwen25_vl import ShownPicture
from backend.nn.qwen25_vl import place_tokens as place_prompt
from backend.nn.qwen_vision import PreparedPicture, fit_area
from backend.state_dict import assign_tensors, check_plan
from tests.support.qwenimage_networks import (
    CONFIG,
    TEXT_WIDTH,
    VAE_CONFIG,
    WIDTH,
    library_flow,
    library_pack,
    make_qwen_vae,
    make_qwenimage,
    original_tensors,
    wan_tensors,
)
from tests.support.tiny_families import (
    ADAPTERS,
    LIBRARY_SPELLINGS,
    ORIGINAL_SPELLINGS,
    TinyFamily,
    check_adapter,
    check_loading,
    check_lora_spelling,
    check_slots,
    identify,
    padded_text_inputs,
)

LENGTHS = [9, 5]
"""Of two texts."""


def make_inputs() -> dict[str, Tensor]:
    return padded_text_inputs(LENGTHS, TEXT_WIDTH, reference_1=(2, 16, 4, 8))


QWEN = TinyFamily(family=FAMILY, config=CONFIG, make=make_qwenimage, original=original_tensors, inputs=make_inputs)
CLEAN = TinyFamily(
    family=FAMILY, config={**CONFIG, "zero_cond_t": True}, make=lambda: make_qwenimage(zero_cond_t=True), original=original_tensors,
    inputs=make_inputs,
)  # fmt: skip
"""As 2511, whose references have a modulation of their own."""


# files and names


@pytest.mark.parametrize(
    ("prefix", "dtype", "layout"),
    [
        ("", torch.float32, Layout.LDM),
        ("model.diffusion_model.", torch.float8_e4m3fn, Layout.LDM),
        ("transformer.", torch.bfloat16, Layout.DIFFUSERS),
    ],
    ids=["bare fp32", "prefixed fp8", "diffusers bf16"],
)
def test_files_are_loaded(tmp_path: Path, prefix: str, dtype: torch.dtype, layout: Layout) -> None:
    found = check_loading(QWEN, tmp_path, original_tensors(make_qwenimage(), prefix), dtype)
    assert (found.part, found.context_width) == (Part(prefix, layout), TEXT_WIDTH)


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_qwenimage())
    assert identify(QWEN, tmp_path, {**tensors, "controlnet_blocks.0.weight": torch.zeros(2, 2)}) is None
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is Qwen-Image-2\.1"):
        identify(QWEN, tmp_path, {"txt_in.text_norm.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="is Qwen-Image-Layered"):
        identify(QWEN, tmp_path, {**tensors, "time_text_embed.addition_t_embedding.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"looks like Qwen-Image, but lacks txt_in\.weight"):
        identify(QWEN, tmp_path, {key: one for key, one in tensors.items() if key != "txt_in.weight"})
    with pytest.raises(CheckpointError, match="128 inputs and 64 outputs per token"):
        identify(QWEN, tmp_path, {**tensors, "img_in.weight": torch.zeros(WIDTH, 128)})


def test_the_kind_of_editing_model_is_told_by_name_or_mark(tmp_path: Path) -> None:
    marked = identify(QWEN, tmp_path, {**original_tensors(make_qwenimage()), "__index_timestep_zero__": torch.empty(0)})
    assert marked is not None and marked.config["zero_cond_t"]
    for name, is_clean in (("Qwen-Image-Edit-2511-bf16", True), ("qwen_image_edit_2509", False)):
        save_file(original_tensors(make_qwenimage()), tmp_path / f"{name}.safetensors")
        with open_tensor_file(tmp_path / f"{name}.safetensors") as file:
            found = FAMILY.identify(file)
        assert found is not None and found.config["zero_cond_t"] is is_clean
    assert is_first_edit("C:/models/qwen_image_edit_fp8_e4m3fn.safetensors") and not is_first_edit("Qwen-Image-Edit-2509.gguf")
    assert not is_first_edit("qwen_image.safetensors")


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(QWEN, spelling)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(QWEN, kind)


# the network


def make_rows(**changes: Tensor) -> dict[str, Tensor]:
    inputs = make_inputs()
    return {
        "x": inputs["x"], "context": inputs["c_crossattn"], "timesteps": torch.tensor([0.9, 0.3]), TEXT_LENGTHS: inputs[TEXT_LENGTHS], **changes,
    }  # fmt: skip


def reference(network: Any, rows: dict[str, Tensor], references: tuple[Tensor, ...] = ()) -> Tensor:
    mask = torch.arange(max(LENGTHS))[None] < rows[TEXT_LENGTHS][:, None]
    with torch.no_grad():
        return library_flow(network, rows["x"], rows["context"], rows["timesteps"], None if bool(mask.all()) else mask, references)


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_qwen_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize("lengths", [[9, 9], LENGTHS], ids=["alike", "unlike"])
def test_the_fold_is_the_library_s_forward(lengths: list[int]) -> None:
    """Up to rounding, as the library rotates by complex products."""
    rows = make_rows(**{TEXT_LENGTHS: torch.tensor(lengths)})
    torch.testing.assert_close(run(QWEN.build(), rows), reference(make_qwenimage(), rows), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tiny", [QWEN, CLEAN], ids=["one time", "references at time 0"])
def test_references_are_the_library_s(tiny: TinyFamily) -> None:
    generator = torch.Generator().manual_seed(9)
    references = (torch.randn(1, 16, 4, 10, generator=generator), torch.randn(1, 16, 12, 6, generator=generator))
    rows = make_rows(reference_1=references[0], reference_2=references[1])
    wanted = reference(tiny.make(), rows, references)
    torch.testing.assert_close(run(tiny.build(), rows), wanted, atol=2e-5, rtol=1e-5)
    assert (wanted - reference(tiny.make(), make_rows())).abs().mean() > 1e-2


def test_places_are_centered_and_the_text_goes_on_along_the_diagonal() -> None:
    places = place_tokens([(6, 4), (2, 10)], 2).tolist()
    assert places[:2] == [[2, 2, 2], [3, 3, 3]], "half of the longest side, five cells"
    assert places[2:4] == [[0, -2, -1], [0, -2, 0]] and places[8:] == [[1, -1, column] for column in (-3, -2, -1, 0, 1)]


def test_what_does_not_count_changes_nothing() -> None:
    rows = make_rows()
    loud = {**rows, "context": rows["context"].clone()}
    loud["context"][1, LENGTHS[1] :] = 1e4
    assert torch.equal(run(QWEN.build(), rows), run(QWEN.build(), loud))


def test_hooks_may_replace_a_block_and_residuals_are_added_to_the_picture_that_is_made() -> None:
    rows, seen = make_rows(reference_1=make_inputs()["reference_1"]), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(sorted(args))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("double_block", 1): keep}}}
    assert torch.equal(run(QWEN.build(), rows, options=hooks), run(QWEN.build(), rows))
    assert seen == [["attn_mask", "img", "pe", "transformer_options", "txt", "vec"]]
    network = QWEN.build()
    program = build_qwen_program(network)
    residual = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    named = program.name_residuals({"input": [None, residual]})
    assert [(one.number, one.target) for one in named] == [(1, "image")]
    assert (run(network, rows, residuals=named) - run(network, rows)).abs().max() > 1e-2


def test_in_fp16_streams_are_fp32_and_do_not_overflow() -> None:
    """A bias of 6e4 lets a block add more than fp16 holds to the stream. Reference: the library in fp32."""
    network, rows = make_qwenimage(), make_rows()
    network.transformer_blocks[1].img_mlp.net[2].bias.fill_(6e4)
    network.transformer_blocks[1].img_mod[1].bias[5 * WIDTH :] = 3.0
    wanted = reference(network, rows)
    program = build_qwen_program(network.half())
    with torch.no_grad():
        state = program.start({name: tensor.half() if name in ("x", "context") else tensor for name, tensor in rows.items()})
        peak = 0.0
        for segment in program.segments:
            segment(state)
            peak = max(peak, float(state.tensors["image"].abs().max()) if "image" in state.tensors else 0.0)
    assert peak > torch.finfo(torch.float16).max
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 4), ("replicas", 2)])
@pytest.mark.parametrize("tiny", [QWEN, CLEAN], ids=["one time", "references at time 0"])
def test_several_slots_give_what_one_gives(tiny: TinyFamily, strategy: str, count: int) -> None:
    """With texts of unlike lengths and a reference."""
    check_slots(tiny, strategy, count)


@pytest.mark.parametrize("count", [2, 3])
def test_tiles_give_what_one_slot_gives(count: int) -> None:
    """Without references, which every tile would need whole."""
    alone = {name: tensor for name, tensor in make_inputs().items() if not name.startswith("reference")}
    check_slots(replace(QWEN, inputs=lambda: alone), "tiles", count)


# guidance


def test_the_guided_flow_is_as_long_as_the_positive_prompt_s_in_every_token() -> None:
    """The library's formula over the packed numbers of a token; odd sides have tokens of fewer latents."""
    generator = torch.Generator().manual_seed(2)
    x, cond, uncond = (torch.randn(2, 16, 6, 8, generator=generator) for _ in range(3))
    guided = uncond + 4.0 * (cond - uncond)
    flow, wanted = library_pack(x - guided), library_pack(x - cond)
    rescaled = flow * wanted.norm(dim=-1, keepdim=True) / flow.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(library_pack(x - keep_flow_length(x, cond, guided)), rescaled, atol=1e-5, rtol=1e-5)
    odd = keep_flow_length(x[..., :5, :7], cond[..., :5, :7], guided[..., :5, :7])
    assert odd.shape == (2, 16, 5, 7)
    corner = (x - guided)[..., 4, 6]
    corner = corner * ((x - cond)[..., 4, 6].norm(dim=1) / corner.norm(dim=1))[:, None]
    torch.testing.assert_close((x[..., :5, :7] - odd)[..., 4, 6], corner, atol=1e-5, rtol=1e-5)
    assert bool(keep_flow_length(x, cond, x).isfinite().all())


# the VAE


def test_wan_s_names_are_those_that_the_library_converts() -> None:
    vae = make_qwen_vae()
    written = wan_tensors(vae)
    assert {original_name(key, 2): key for key in vae.state_dict()} == dict(zip(written, vae.state_dict()))
    converted = convert_wan_vae_to_diffusers(dict(written))
    assert converted.keys() == vae.state_dict().keys()


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("layers", [1, 2])
def test_pictures_run_as_the_library_s_single_frames(tmp_path: Path, layout: str, layers: int) -> None:
    library = make_qwen_vae(num_res_blocks=layers)
    tensors = wan_tensors(library) if layout == "wan" else library.state_dict()
    save_file({f"vae.{key}": tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    with open_tensor_file(tmp_path / "vae.safetensors") as file:
        (part,) = find_qwen_vae(file.infos)
        vae: Any = qwen_vae("Qwen-Image").build(file, part)
        plan = plan_qwen_vae(vae, file, part)
        check_plan(plan, file, "VAE")
        assert plan.unexpected == ()
        assign_tensors(vae, plan, file, storage_dtype=torch.float32)
    assert vae.config.block_out_channels == [8, 16, 32, 32] and vae.config.layers_per_block == layers
    generator = torch.Generator().manual_seed(1)
    picture, latents = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1, torch.randn(2, 16, 4, 6, generator=generator)
    with torch.no_grad():
        posterior = vae.encode(picture, return_dict=False)[0]
        wanted = library.encode(picture.unsqueeze(2)).latent_dist
        torch.testing.assert_close(posterior.mode(), wanted.mode().squeeze(2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(posterior.std, wanted.std.squeeze(2), atol=1e-5, rtol=1e-5)
        decoded = vae.decode(latents, return_dict=False)[0]
        torch.testing.assert_close(decoded, library.decode(latents.unsqueeze(2)).sample.squeeze(2), atol=1e-5, rtol=1e-5)


def test_vaes_of_other_shapes_are_refused(tmp_path: Path) -> None:
    three_levels = {"dim_mult": (1, 2, 2), "temperal_downsample": (False, True)}
    for changes, message in (({"z_dim": 8}, "is a VAE with 8 latent channels"), (three_levels, "levels of resnets")):
        save_file(dict(library_vae(**changes).state_dict()), tmp_path / "vae.safetensors")
        with open_tensor_file(tmp_path / "vae.safetensors") as file, pytest.raises(CheckpointError, match=message):
            qwen_vae("Qwen-Image").build(file, find_qwen_vae(file.infos)[0])


def library_vae(**changes: Any) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(**{**VAE_CONFIG, **{name: list(one) if isinstance(one, tuple) else one for name, one in changes.items()}})


def test_latents_have_the_published_means_and_deviations() -> None:
    vae = make_qwen_vae()
    z = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(vae.config[name]).view(1, 16, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(LATENT.from_vae(z), (z - mean) / std)
    torch.testing.assert_close(LATENT.to_vae(LATENT.from_vae(z)), z)


# pictures for the text encoder


def test_strips_and_dots_become_pictures_of_bounded_size() -> None:
    assert fit_area(4000, 3000, 384 * 384) == (448, 320) and fit_area(1, 1, 384 * 384) == (384, 384)
    assert fit_area(16384, 1, 384 * 384) == (4608, 32) and fit_area(1, 16384, 1024 * 1024) == (32, 32768)


def test_places_of_a_prompt_with_pictures() -> None:
    """Reference: the paper's rule, written out."""
    picture = PreparedPicture(torch.zeros(24, 1), 4, 6)
    assert place_prompt(9, [ShownPicture(2, picture)]).tolist() == [
        [0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4], [5, 5, 5],
    ]  # fmt: skip
