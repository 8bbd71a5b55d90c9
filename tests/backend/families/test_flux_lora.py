"""LoRAs on Flux.1 in every spelling of the field, over a file's fused matrices and the network's own parts.

Reference: the same change made by hand to the weights of an original file, as the formulas of the papers write it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.families.flux.key_map import flux_key_map
from backend.families.flux.program import build_flux_program
from backend.modules.k_model import KModel
from backend.modules.k_prediction import FlowPrediction
from backend.nn.t5 import T5TextEncoder
from backend.patcher.clip import CLIP
from backend.patcher.lora_files import LoraError, match_lora, parse_lora
from backend.patcher.unet import UnetPatcher
from tests.support.flux_checkpoints import make_clip
from tests.support.flux_networks import WIDTH, make_flux, original_tensors
from tests.support.t5_encoders import t5_encoder

CPU = torch.device("cpu")
RANK, ALPHA = 4, 2.0


def make_patcher() -> UnetPatcher:
    flux = make_flux()
    model = KModel(flux, FlowPrediction(multiplier=1.0), build_program=build_flux_program, key_map=flux_key_map(flux))
    return UnetPatcher(model, CPU, CPU)


def patched_weights(file: dict[str, Tensor], strength: float = 0.75) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's weights with the file applied: in the original layout, and under the network's names."""
    unet = make_patcher()
    patches = match_lora(parse_lora("test", file), unet, None, model_family="Flux.1")
    assert patches.unmatched == ()
    unet.add_patches(filename="test", patches=dict(patches.unet), strength_patch=strength)
    unet.refresh_loras()
    network = unet.model.diffusion_model
    return original_tensors(network), network.state_dict()


def matrices(tensors: dict[str, Tensor]) -> list[str]:
    return [key.removesuffix(".weight") for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim == 2]


def make_change(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(up, down) of every matrix."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: tensors[f"{name}.weight"].shape for name in matrices(tensors)}
    return {
        name: (torch.randn(shape[0], RANK, generator=generator) * 0.1, torch.randn(RANK, shape[1], generator=generator) * 0.1)
        for name, shape in shapes.items()
    }


def check_merged(made: dict[str, Tensor], before: dict[str, Tensor], differences: dict[str, Tensor]) -> None:
    assert differences
    for key, tensor in before.items():
        name = key.removesuffix(".weight")
        wanted = tensor + differences[name] if name != key and name in differences else tensor
        torch.testing.assert_close(made[key], wanted, atol=2e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def _kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


ORIGINAL_SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (_kohya, ".lora_up.weight", ".lora_down.weight"),
    "LyCORIS": (lambda name: f"lycoris_{name.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight"),
    "diffusion_model.": (lambda name: f"diffusion_model.{name}", ".lora_B.weight", ".lora_A.weight"),
    "PEFT without a component": (lambda name: f"base_model.model.{name}", ".lora_B.weight", ".lora_A.weight"),
}
LIBRARY_SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "transformer.": (lambda name: f"transformer.{name}", ".lora_B.weight", ".lora_A.weight"),
    "transformer. with an adapter's name": (lambda name: f"transformer.{name}", ".lora_B.default.weight", ".lora_A.default.weight"),
    "PEFT": (lambda name: f"base_model.model.{name}", ".lora_B.weight", ".lora_A.weight"),
    "OneTrainer": (lambda name: f"lora_transformer_{name.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight"),
    "kohya of the library's names": (_kohya, ".lora_up.weight", ".lora_down.weight"),
}


@pytest.mark.parametrize("spelling", ORIGINAL_SPELLINGS)
def test_changes_of_an_original_file_s_matrices(spelling: str) -> None:
    name_of, up_ending, down_ending = ORIGINAL_SPELLINGS[spelling]
    before = original_tensors(make_flux())
    change = make_change(before)
    file: dict[str, Tensor] = {}
    for name, (up, down) in change.items():
        file.update({name_of(name) + up_ending: up, name_of(name) + down_ending: down, f"{name_of(name)}.alpha": torch.tensor(ALPHA)})
    made, _ = patched_weights(file)
    check_merged(made, before, {name: 0.75 * ALPHA / RANK * up @ down for name, (up, down) in change.items()})


@pytest.mark.parametrize("spelling", LIBRARY_SPELLINGS)
def test_changes_of_the_library_s_matrices(spelling: str) -> None:
    name_of, up_ending, down_ending = LIBRARY_SPELLINGS[spelling]
    before = make_flux().state_dict()
    change = make_change(before)
    file: dict[str, Tensor] = {}
    for name, (up, down) in change.items():
        file.update({name_of(name) + up_ending: up, name_of(name) + down_ending: down})
    _, made = patched_weights(file)
    check_merged(made, before, {name: 0.75 * up @ down for name, (up, down) in change.items()})


def test_xlabs_names_and_the_library_s_fused_projections() -> None:
    before = original_tensors(make_flux())
    change = make_change(before)
    xlabs = {
        "double_blocks.1.img_attn.qkv": "double_blocks.1.processor.qkv_lora1",
        "double_blocks.1.txt_attn.qkv": "double_blocks.1.processor.qkv_lora2",
        "double_blocks.1.img_attn.proj": "double_blocks.1.processor.proj_lora1",
        "double_blocks.1.txt_attn.proj": "double_blocks.1.processor.proj_lora2",
        "single_blocks.2.linear2": "single_blocks.2.processor.proj_lora",
    }
    fused = {
        "double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.to_qkv",
        "double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.to_added_qkv",
    }
    file: dict[str, Tensor] = {}
    for name, other in xlabs.items():
        file.update({f"{other}.up.weight": change[name][0], f"{other}.down.weight": change[name][1]})
    for name, other in fused.items():
        file.update({f"transformer.{other}.lora_B.weight": change[name][0], f"transformer.{other}.lora_A.weight": change[name][1]})
    up, down = change["single_blocks.2.linear1"]
    attention_up = up[: 3 * WIDTH]  # XLabs leaves the MLP's rows alone
    file.update({"single_blocks.2.processor.qkv_lora.up.weight": attention_up, "single_blocks.2.processor.qkv_lora.down.weight": down})
    made, _ = patched_weights(file)
    differences = {name: 0.75 * change[name][0] @ change[name][1] for name in (*xlabs, *fused)}
    differences["single_blocks.2.linear1"] = 0.75 * torch.cat([attention_up @ down, torch.zeros(up.shape[0] - 3 * WIDTH, down.shape[1])])
    check_merged(made, before, differences)


def test_a_single_block_s_fused_projection_of_the_library() -> None:
    before = make_flux().state_dict()
    up, down = torch.randn(3 * WIDTH, RANK) * 0.1, torch.randn(RANK, WIDTH) * 0.1
    layer = "transformer.single_transformer_blocks.1.attn.to_qkv"
    _, made = patched_weights({f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down})
    parts = zip(("to_q", "to_k", "to_v"), (0.75 * up @ down).chunk(3))
    check_merged(made, before, {f"single_transformer_blocks.1.attn.{name}": part for name, part in parts})


SHARED_NAMES = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.txt_attn.qkv",
    "single_blocks.0.linear1",
    "single_blocks.2.linear2",
    "final_layer.adaLN_modulation.1",
)


def test_loha_and_lokr_over_fused_matrices() -> None:
    before = original_tensors(make_flux())
    generator = torch.Generator().manual_seed(4)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    loha: dict[str, Tensor] = {}
    lokr: dict[str, Tensor] = {}
    loha_differences, lokr_differences = {}, {}
    for name in SHARED_NAMES:
        outputs, inputs = before[f"{name}.weight"].shape
        w1_a, w1_b, w2_a, w2_b = numbers(outputs, RANK), numbers(RANK, inputs), numbers(outputs, RANK), numbers(RANK, inputs)
        loha |= {
            f"{_kohya(name)}.{part}": tensor for part, tensor in (("hada_w1_a", w1_a), ("hada_w1_b", w1_b), ("hada_w2_a", w2_a), ("hada_w2_b", w2_b))
        }
        loha[f"{_kohya(name)}.alpha"] = torch.tensor(ALPHA)
        loha_differences[name] = 0.75 * ALPHA / RANK * (w1_a @ w1_b) * (w2_a @ w2_b)
        w1, w2 = numbers(4, 4), numbers(outputs // 4, inputs // 4)
        lokr |= {f"diffusion_model.{name}.lokr_w1": w1, f"diffusion_model.{name}.lokr_w2": w2}
        lokr_differences[name] = 0.75 * torch.kron(w1, w2)
    for file, differences in ((loha, loha_differences), (lokr, lokr_differences)):
        made, _ = patched_weights(file)
        check_merged(made, before, differences)


def test_dora_with_lengths_of_outputs_over_fused_matrices() -> None:
    """Each row keeps its direction and gets the trained length. Liu et al. 2024, equation 5, lengths of outputs as PEFT and LyCORIS write them."""
    before = original_tensors(make_flux())
    change = {name: make_change(before)[name] for name in SHARED_NAMES}
    file: dict[str, Tensor] = {}
    differences = {}
    for name, (up, down) in change.items():
        weight = before[f"{name}.weight"]
        lengths = torch.rand(weight.shape[0], 1, generator=torch.Generator().manual_seed(5)) + 0.5
        file |= {f"{_kohya(name)}.lora_up.weight": up, f"{_kohya(name)}.lora_down.weight": down, f"{_kohya(name)}.dora_scale": lengths}
        total = weight + up @ down
        differences[name] = total / total.norm(dim=1, keepdim=True) * lengths - weight
    made, _ = patched_weights(file, strength=1.0)
    check_merged(made, before, differences)


def test_changes_whose_rows_depend_on_each_other_are_refused_over_matrices_that_the_network_has_in_parts() -> None:
    before = original_tensors(make_flux())
    name = "double_blocks.0.img_attn.qkv"
    up, down = make_change(before)[name]
    file = {f"{_kohya(name)}.lora_up.weight": up, f"{_kohya(name)}.lora_down.weight": down, f"{_kohya(name)}.dora_scale": torch.ones(1, WIDTH)}
    with pytest.raises(LoraError, match=r"DoRA.*inputs"):
        patched_weights(file)
    blocks = torch.zeros(3 * WIDTH // 9, 9, 9)
    with pytest.raises(LoraError, match=r"OFT blocks.*cross"):
        patched_weights({f"{_kohya(name)}.oft_blocks": blocks})


def test_oft_over_fused_matrices() -> None:
    """Rotated groups of outputs that lie within q, k and v."""
    before = original_tensors(make_flux())
    name, size = "double_blocks.0.img_attn.qkv", 8
    blocks = torch.randn(3 * WIDTH // size, size, size, generator=torch.Generator().manual_seed(6)) * 0.1
    made, _ = patched_weights({f"{_kohya(name)}.oft_blocks": blocks}, strength=1.0)
    skew = blocks - blocks.transpose(1, 2)
    rotations = (torch.eye(size) + skew) @ torch.linalg.inv(torch.eye(size) - skew)
    weight = before[f"{name}.weight"]
    turned = torch.einsum("gnm,gni->gmi", rotations, weight.reshape(-1, size, WIDTH)).reshape(weight.shape)
    check_merged(made, before, {name: turned - weight})


def test_a_bias_and_a_whole_difference_of_the_swapped_layer() -> None:
    before = original_tensors(make_flux())
    name = "final_layer.adaLN_modulation.1"
    difference, bias = torch.randn_like(before[f"{name}.weight"]), torch.randn_like(before[f"{name}.bias"])
    file: dict[str, Any] = {f"diffusion_model.{name}.diff": difference, f"diffusion_model.{name}.diff_b": bias}
    made, _ = patched_weights(file, strength=1.0)
    torch.testing.assert_close(made[f"{name}.weight"], before[f"{name}.weight"] + difference)
    torch.testing.assert_close(made[f"{name}.bias"], before[f"{name}.bias"] + bias)


def test_a_lora_of_another_family_is_refused_by_name() -> None:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    file = {f"{layer}.lora_up.weight": torch.zeros(8, 2), f"{layer}.lora_down.weight": torch.zeros(2, 2048)}
    with pytest.raises(LoraError, match=r"Flux\.1.*made for SDXL"):
        patched_weights(file)


@pytest.mark.parametrize(
    ("clip_name", "t5_name"),
    [("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"),
     ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_te2_encoder_block_0_layer_0_SelfAttention_q"),
     ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q")],
)  # fmt: skip
def test_changes_of_the_text_encoders(clip_name: str, t5_name: str) -> None:
    """CLIP-L is the first for everybody; T5 the third for kohya, the second for others."""
    t5 = T5TextEncoder(t5_encoder().config)
    clip = CLIP({"clip_l": make_clip(), "t5xxl": t5})
    ends = (".lora_up.weight", ".lora_down.weight") if clip_name.startswith("lora_te") else (".lora_B.weight", ".lora_A.weight")
    file = {}
    for name, shape in ((clip_name, (64, 64)), (t5_name, (24, 32))):
        file |= {name + ends[0]: torch.randn(shape[0], 2), name + ends[1]: torch.randn(2, shape[1])}
    patches = match_lora(parse_lora("test", file), make_patcher(), clip, model_family="Flux.1")
    weights = [name for name in patches.clip if not name.endswith("bias")]
    assert len(weights) == 2 and patches.unmatched == ()
    assert {name.partition(".")[0] for name in weights} == {"clip_l", "t5xxl"}
