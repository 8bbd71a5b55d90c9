"""LoRAs on Flux.1 in every spelling of the field, over a file's fused matrices and the network's own parts.

Reference: the same change made by hand to the weights of an original file, as the formulas of the papers write it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backend.families.flux import FAMILY
from backend.nn.t5 import T5TextEncoder
from backend.patcher.clip import CLIP
from backend.patcher.lora_files import LoraError, match_lora, parse_lora
from tests.support.flux_checkpoints import make_clip
from tests.support.flux_networks import CONFIG, WIDTH, make_flux, original_tensors
from tests.support.t5_encoders import t5_encoder
from tests.support.tiny_families import (
    ADAPTERS,
    LIBRARY_SPELLINGS,
    ORIGINAL_SPELLINGS,
    RANK,
    STRENGTH,
    Numbers,
    TinyFamily,
    apply_file,
    check_adapter,
    check_lora_spelling,
    check_weights,
    kohya,
    matrices,
)


def make_inputs() -> dict[str, Tensor]:
    raise NotImplementedError("these tests run no network")


FLUX = TinyFamily(family=FAMILY, config=CONFIG, make=make_flux, original=original_tensors, inputs=make_inputs)
MORE_ORIGINAL_SPELLINGS = {
    "PEFT without a component": (lambda name: f"base_model.model.{name}", ".lora_B.weight", ".lora_A.weight"),
}
MORE_LIBRARY_SPELLINGS = {
    "transformer. with an adapter's name": (lambda name: f"transformer.{name}", ".lora_B.default.weight", ".lora_A.default.weight"),
    "PEFT": (lambda name: f"base_model.model.{name}", ".lora_B.weight", ".lora_A.weight"),
    "kohya of the library's names": (kohya, ".lora_up.weight", ".lora_down.weight"),
}


def patched_weights(file: dict[str, Tensor], strength: float = STRENGTH) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's weights with the file applied: in the original layout, and under the network's names."""
    network = apply_file(FLUX, file, strength)
    return original_tensors(network), network.state_dict()


def make_change(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(up, down) of every matrix."""
    numbers = Numbers()
    return {name: (numbers(weight.shape[0], RANK), numbers(RANK, weight.shape[1])) for name, weight in matrices(tensors).items()}


def check_merged(made: dict[str, Tensor], before: dict[str, Tensor], differences: dict[str, Tensor]) -> None:
    assert differences
    check_weights(made, before | {f"{name}.weight": before[f"{name}.weight"] + added for name, added in differences.items()})


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(FLUX, spelling)


@pytest.mark.parametrize("spelling", [*MORE_ORIGINAL_SPELLINGS, *MORE_LIBRARY_SPELLINGS])
def test_more_spellings_of_this_family(spelling: str) -> None:
    check_lora_spelling(FLUX, spelling, MORE_ORIGINAL_SPELLINGS, MORE_LIBRARY_SPELLINGS)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(FLUX, kind)


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
    differences = {name: STRENGTH * change[name][0] @ change[name][1] for name in (*xlabs, *fused)}
    differences["single_blocks.2.linear1"] = STRENGTH * torch.cat([attention_up @ down, torch.zeros(up.shape[0] - 3 * WIDTH, down.shape[1])])
    check_merged(made, before, differences)


def test_a_single_block_s_fused_projection_of_the_library() -> None:
    before = make_flux().state_dict()
    up, down = torch.randn(3 * WIDTH, RANK) * 0.1, torch.randn(RANK, WIDTH) * 0.1
    layer = "transformer.single_transformer_blocks.1.attn.to_qkv"
    _, made = patched_weights({f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down})
    parts = zip(("to_q", "to_k", "to_v"), (STRENGTH * up @ down).chunk(3))
    check_merged(made, before, {f"single_transformer_blocks.1.attn.{name}": part for name, part in parts})


def test_changes_whose_rows_depend_on_each_other_are_refused_over_matrices_that_the_network_has_in_parts() -> None:
    before = original_tensors(make_flux())
    name = "double_blocks.0.img_attn.qkv"
    up, down = make_change(before)[name]
    file = {f"{kohya(name)}.lora_up.weight": up, f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.dora_scale": torch.ones(1, WIDTH)}
    with pytest.raises(LoraError, match=r"DoRA.*inputs"):
        patched_weights(file)
    blocks = torch.zeros(3 * WIDTH // 9, 9, 9)
    with pytest.raises(LoraError, match=r"OFT blocks.*cross"):
        patched_weights({f"{kohya(name)}.oft_blocks": blocks})


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
    patches = match_lora(parse_lora("test", file), FLUX.patcher(), clip, model_family="Flux.1")
    weights = [name for name in patches.clip if not name.endswith("bias")]
    assert len(weights) == 2 and patches.unmatched == ()
    assert {name.partition(".")[0] for name in weights} == {"clip_l", "t5xxl"}
