"""LoRA files with all kinds and naming schemes find their layers; names are compared with diffusers' converter."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from backend import key_layout
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.patcher.clip import CLIP
from backend.patcher.lora_files import LoraError, LoraPatchSet, match_lora, parse_lora, read_lora_file
from backend.patcher.lora_keys import model_lora_keys_clip, model_lora_keys_unet, split_key
from backend.patcher.lora_math import DiffPatch, GloraPatch, Ia3Patch, LohaPatch, LokrPatch, LoraPatch, OftPatch, SetPatch
from backend.patcher.unet import UnetPatcher
from tests.support.checkpoints import build_models

CPU = torch.device("cpu")
SLOTS = {"sd15": ("clip_l",), "sd20": ("clip_h",), "sdxl": ("clip_l", "clip_g")}
QUERY = "diffusion_model.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"


@cache
def networks(family: str) -> tuple[UnetPatcher, CLIP]:
    models = build_models(Path("none"), family)
    clip = CLIP(dict(zip(SLOTS[family], models.text_encoders, strict=True)))
    return UnetPatcher(KModel(models.unet, Prediction()), CPU, CPU), clip


def match(tensors: Mapping[str, Tensor], family: str = "sd15", metadata: Mapping[str, str] | None = None) -> LoraPatchSet:
    return match_lora(parse_lora("test", tensors, metadata), *networks(family), model_family="SD 1.x")


def shape_of(name: str, family: str = "sd15") -> torch.Size:
    unet, _ = networks(family)
    return dict(unet.model.named_parameters())[name].shape


def pair(layer: str, shape: torch.Size, up: str = ".lora_up.weight", down: str = ".lora_down.weight") -> dict[str, Tensor]:
    return {layer + up: torch.randn(shape[0], 2), layer + down: torch.randn(2, shape[1])}


def linear_layers(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters() if name.endswith(".weight") and parameter.ndim == 2}


# names


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohya_names_mean_what_diffusers_takes_them_for(family: str) -> None:
    """Attention layers under kohya's names and under those of diffusers' converter: the same weight."""
    unet, _ = networks(family)
    config: Any = unet.model.diffusion_model.config
    originals = key_layout.unet_module_names(config)
    layers = {name.removesuffix(".weight") for name in linear_layers(unet.model.diffusion_model) if ".attentions." in name}
    targets: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        spoken = key_layout.rename_by_module(layer, originals) if family == "sdxl" else layer
        made = pair("lora_unet_" + spoken.replace(".", "_"), torch.Size([4, 4]))
        targets |= {id(tensor): f"diffusion_model.{layer}.weight" for tensor in made.values()}
        tensors |= made
    ours = model_lora_keys_unet(unet.model)
    assert all(ours[_layer_of(key)] == targets[id(tensor)] for key, tensor in tensors.items())
    renamed = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), config) if family == "sdxl" else dict(tensors)
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(renamed)
    assert len(theirs) == len(tensors)
    assert {key: ours[_layer_of(key)] for key in theirs} == {key: targets[id(tensor)] for key, tensor in theirs.items()}


def _layer_of(key: str) -> str:
    split = split_key(key)
    assert split is not None
    return split[0]


TEXT_CASES = [("sd15", "lora_te_", "clip_l"), ("sd20", "lora_te_", "clip_h"), ("sdxl", "lora_te1_", "clip_l"), ("sdxl", "lora_te2_", "clip_g")]


@pytest.mark.parametrize(("family", "prefix", "slot"), TEXT_CASES)
def test_text_encoder_names(family: str, prefix: str, slot: str) -> None:
    _, clip = networks(family)
    names = model_lora_keys_clip(clip.cond_stage_model)
    parameters = dict(clip.cond_stage_model.named_parameters())
    layers = [name for name in linear_layers(clip.cond_stage_model) if name.startswith(slot) and ".layers." in name]
    assert layers
    for name in layers:
        bare = name.removeprefix(f"{slot}.").removeprefix("text_model.").removesuffix(".weight")
        second = prefix == "lora_te2_"
        for alias in (
            f"{prefix}text_model_{bare.replace('.', '_')}",
            f"text_encoder{'_2' if second else ''}.text_model.{bare}",
            f"text_encoder{'_2' if second else ''}.{bare}",
        ):
            assert names[alias] == name and name in parameters


def test_the_second_encoders_projection_has_its_name() -> None:
    assert model_lora_keys_clip(networks("sdxl")[1].cond_stage_model)["lora_te2_text_projection"] == "clip_g.text_projection.weight"


@pytest.mark.parametrize(
    ("layer", "up", "down"),
    [
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q", ".lora_up.weight", ".lora_down.weight"),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_q", ".lora_up.weight", ".lora_down.weight"),
        ("lycoris_mid_block_attentions_0_transformer_blocks_0_attn2_to_q", ".lora_up.weight", ".lora_down.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q", ".lora_B.weight", ".lora_A.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q", ".lora.up.weight", ".lora.down.weight"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q", "_lora.up.weight", "_lora.down.weight"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q", "_lora.up.weight", "_lora.down.weight"),
        ("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_q", ".lora_B.weight", ".lora_A.weight"),
        ("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q", ".lora_B.weight", ".lora_A.weight"),
    ],
)
def test_one_layer_under_all_its_names(layer: str, up: str, down: str) -> None:
    assert match(pair(layer, shape_of(QUERY), up, down)).unet.keys() == {QUERY}


def test_the_output_projection_of_old_diffusers_files() -> None:
    name = "diffusion_model.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out"
    assert match(pair(layer, shape_of(name), "_lora.up.weight", "_lora.down.weight")).unet.keys() == {name}


def test_layers_outside_the_attentions() -> None:
    unet, _ = networks("sdxl")
    names = model_lora_keys_unet(unet.model)
    for alias, target in {
        "lora_unet_input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "lora_unet_input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_label_emb_0_2": "add_embedding.linear_2",
        "lora_unet_time_embed_0": "time_embedding.linear_1",
        "lora_unet_out_2": "conv_out",
        "lora_unet_input_blocks_0_0": "conv_in",
        "lora_unet_down_blocks_0_resnets_0_conv1": "down_blocks.0.resnets.0.conv1",
    }.items():
        assert names[alias] == f"diffusion_model.{target}.weight"


# kinds


def pair_of_loha(out: int, inputs: int, first: str, second: str) -> dict[str, Tensor]:
    return {f"{name}{end}": torch.ones(*shape) for name in (first, second) for end, shape in (("_a", (out, 2)), ("_b", (2, inputs)))}


def kinds() -> dict[str, tuple[type, dict[str, Tensor]]]:
    out, inputs = shape_of(QUERY)
    glora = torch.ones(inputs, 2), torch.ones(2, inputs), torch.ones(out, 2), torch.ones(2, inputs)
    return {
        "lora": (LoraPatch, {"lora_up.weight": torch.ones(out, 2), "lora_down.weight": torch.ones(2, inputs), "alpha": torch.tensor(1.0)}),
        "dora": (LoraPatch, {"lora_A.weight": torch.ones(2, inputs), "lora_B.weight": torch.ones(out, 2), "lora_magnitude_vector": torch.ones(out)}),
        "loha": (LohaPatch, pair_of_loha(out, inputs, "hada_w1", "hada_w2")),
        "lokr": (LokrPatch, {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(out // 2, 2), "lokr_w2_b": torch.ones(2, inputs // 2)}),
        "glora": (GloraPatch, dict(zip(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), glora, strict=True))),
        "oft": (OftPatch, {"oft_blocks": torch.zeros(2, out // 2, out // 2), "alpha": torch.tensor(0.1)}),
        "ia3": (Ia3Patch, {"weight": torch.ones(out), "on_input": torch.tensor(0)}),
        "full": (DiffPatch, {"diff": torch.ones(out, inputs)}),
        "set": (SetPatch, {"set_weight": torch.ones(out, inputs)}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "glora", "oft", "ia3", "full", "set"])
def test_every_kind_is_read_for_what_it_is(kind: str) -> None:
    expected, parts = kinds()[kind]
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    found = match({f"{layer}.{part}": tensor for part, tensor in parts.items()})
    assert found.unet.keys() == {QUERY} and type(found.unet[QUERY]) is expected and found.unmatched == ()
    assert getattr(found.unet[QUERY], "alpha", None) == (1.0 if kind == "lora" else None)
    assert (getattr(found.unet[QUERY], "dora_scale", None) is not None) is (kind == "dora")


def test_norms_and_biases() -> None:
    found = match(
        {
            "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": torch.ones(32),
            "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": torch.ones(32),
            "lora_unet_down_blocks_0_resnets_0_conv1.diff": torch.ones(32, 32, 3, 3),
            "lora_unet_down_blocks_0_resnets_0_conv1.diff_b": torch.ones(32),
        }
    )
    names = {"norm1.weight", "norm1.bias", "conv1.weight", "conv1.bias"}
    assert found.unet.keys() == {f"diffusion_model.down_blocks.0.resnets.0.{name}" for name in names}


def test_alphas_of_diffusers_metadata() -> None:
    facts = {"unet.lora_alpha": 4, "unet.r": 2, "unet.use_rslora": False, "unet.alpha_pattern": {"attn2.to_k": 8}}
    tensors: dict[str, Tensor] = {}
    for name in ("attn2.to_q", "attn2.to_k"):
        layer = f"unet.mid_block.attentions.0.transformer_blocks.0.{name}"
        tensors |= pair(layer, shape_of(f"diffusion_model.{layer.removeprefix('unet.')}.weight"), ".lora_B.weight", ".lora_A.weight")
    found = match(tensors, metadata={"lora_adapter_metadata": json.dumps(facts)}).unet
    assert {name.rpartition("attn2.")[2]: patch.alpha for name, patch in found.items()} == {"to_q.weight": 4.0, "to_k.weight": 8.0}  # type: ignore[attr-defined]
    plain = match(tensors).unet
    assert {patch.alpha for patch in plain.values()} == {None}  # type: ignore[attr-defined]


# what does not fit


def full_lora(family: str) -> dict[str, Tensor]:
    unet, _ = networks(family)
    config: Any = unet.model.diffusion_model.config
    originals = key_layout.unet_module_names(config)
    tensors: dict[str, Tensor] = {}
    for name, shape in linear_layers(unet.model.diffusion_model).items():
        layer = name.removesuffix(".weight")
        spoken = key_layout.rename_by_module(layer, originals) if family == "sdxl" else layer
        tensors |= pair("lora_unet_" + spoken.replace(".", "_"), shape)
    return tensors


def test_a_full_lora_matches_its_family_and_no_other() -> None:
    assert match(full_lora("sd15")).unmatched == ()
    assert match(full_lora("sdxl"), "sdxl").unmatched == ()
    with pytest.raises(LoraError, match=r"test does not fit SD 1\.x: .* layers .*made for SDXL.*Nothing of it was applied"):
        match(full_lora("sdxl"), metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(LoraError, match="do not fit"):
        match(full_lora("sd15"), "sd20")


def test_the_family_is_derived_from_the_layers_without_metadata() -> None:
    wide = {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_{name}.weight": torch.ones(4, 1024) for name in ("up", "down")}
    assert parse_lora("x", wide).family == "SD 2.x"
    assert parse_lora("x", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)}).family == "Flux"
    assert parse_lora("x", {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 2)}).family == "SDXL"
    assert parse_lora("x", wide, {"modelspec.architecture": "stable-diffusion-v1/lora"}).family == "SD 1.x"
    with pytest.raises(LoraError, match="Flux"):
        match({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)})


def test_a_few_unknown_layers_are_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    tensors = full_lora("sd15") | {f"lora_unet_new_{index}.lora_up.weight": torch.ones(2, 2) for index in range(5)} | {"odd": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        found = match(tensors)
    assert len(found.unmatched) == 6
    assert [record.message for record in caplog.records if "LoRA test" in record.message] == [
        "LoRA test: 6 layers or keys do not exist in the model and are ignored (first: lora_unet_new_0, lora_unet_new_1, lora_unet_new_2)."
    ]


def test_a_layer_without_all_its_parts_has_no_place() -> None:
    tensors = full_lora("sd15")
    tensors.pop("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q.lora_up.weight")
    assert match(tensors).unmatched == ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q",)


def test_other_files_are_refused_as_lora() -> None:
    with pytest.raises(LoraError, match="this is not a LoRA"):
        parse_lora("checkpoint", {"model.diffusion_model.out.2.weight": torch.ones(2, 2)})


# files


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_files_of_every_format(tmp_path: Path, suffix: str) -> None:
    tensors = pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q", shape_of(QUERY))
    path = tmp_path / f"cat{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path, metadata={"ss_base_model_version": "sd_v1"})
    else:
        torch.save({"state_dict": tensors}, path)
    file = read_lora_file(path)
    assert (file.name, file.family) == ("cat", "SD 1.x" if suffix == ".safetensors" else None)
    assert match_lora(file, *networks("sd15")).unet.keys() == {QUERY}


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{" + b" " * 50)
    with pytest.raises(LoraError, match="broken"):
        read_lora_file(tmp_path / "broken.safetensors")
    with pytest.raises(LoraError, match=r"gone\.safetensors"):
        read_lora_file(tmp_path / "gone.safetensors")


# Forge's names on the UNet


def test_patches_under_original_names_and_frozen_ones_find_their_weights() -> None:
    unet, _ = networks("sd15")
    name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    clone = unet.clone()
    assert clone.add_patches(
        filename="x", patches={name: ("diff", (torch.ones(shape_of(QUERY)),)), "diffusion_model.no.weight": (torch.ones(1),)}
    ) == {name}
    assert {key for patches in clone.lora_patches.values() for key in patches} == {QUERY}
    frozen = unet.clone()
    frozen.load_frozen_patcher("x", {f"{QUERY}::lora::0": torch.ones(128, 2), f"{QUERY}::lora::1": torch.ones(2, 128)}, 0.5)
    ((identifier, patches),) = frozen.lora_patches.items()
    assert identifier == ("x", 0.5, 1.0, False) and list(patches) == [QUERY]


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "magnitude"])
def test_pefts_magnitudes_are_for_outputs_in_any_shape(spelling: str) -> None:
    out, inputs = shape_of(QUERY)
    pair = {f"{LAYER}.lora_A.weight": torch.ones(2, inputs), f"{LAYER}.lora_B.weight": torch.ones(out, 2)}
    found = match({**pair, f"{LAYER}.{spelling}": torch.arange(1.0, out + 1).reshape(1, out)})
    changed = found.unet[QUERY].merge(torch.zeros(out, inputs), 1.0)
    torch.testing.assert_close(changed.norm(dim=1), torch.arange(1.0, out + 1))


def test_oft_diag_differs_from_oft_blocks() -> None:
    out, _ = shape_of(QUERY)
    identity = {f"{LAYER}.oft_diag": torch.eye(out // 2).repeat(2, 1, 1)}
    weight = torch.randn(shape_of(QUERY), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(match(identity).unet[QUERY].merge(weight.clone(), 1.0), weight)


@pytest.mark.parametrize(
    "change",
    [
        {"dora_scale": torch.ones(3)},
        {"dora_scale": torch.ones(())},
        {"magnitude": torch.ones(3)},
        {"alpha": torch.ones(0)},
        {"lora_down.weight": torch.ones(())},
        {"lora_up.weight": torch.ones(0, 2)},
        {"lora_mid.weight": torch.ones(2)},
    ],
)
def test_a_damaged_layer_is_refused_before_merging_by_the_files_name(change: dict[str, Tensor]) -> None:
    out, inputs = shape_of(QUERY)
    parts = {"lora_up.weight": torch.ones(out, 2), "lora_down.weight": torch.ones(2, inputs), "alpha": torch.ones(1), **change}
    with pytest.raises(LoraError, match=r"damaged|do not fit"):
        match({f"{LAYER}.{part}": tensor for part, tensor in parts.items()})


def test_magnitudes_are_refused_for_kinds_without_them() -> None:
    out, _ = shape_of(QUERY)
    with pytest.raises(LoraError, match="DoRA magnitudes, which this kind"):
        match({f"{LAYER}.oft_blocks": torch.zeros(2, out // 2, out // 2), f"{LAYER}.dora_scale": torch.ones(out, 1)})


@pytest.mark.parametrize(
    "facts", ["[" * 2000, "[1]", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 4, "unet.alpha_pattern": [1]}', '{"unet.lora_alpha": 1e999}']
)
def test_invalid_diffusers_metadata_is_ignored(facts: str) -> None:
    out, inputs = shape_of(QUERY)
    pair = {f"{LAYER}.lora_down.weight": torch.ones(2, inputs), f"{LAYER}.lora_up.weight": torch.ones(out, 2)}
    match_lora_of = parse_lora("odd", pair, {"lora_adapter_metadata": facts})
    assert match_lora_of.layers.keys() == {LAYER}
