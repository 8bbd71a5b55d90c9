"""Z-Image's files, names, network and LoRAs. References: diffusers' ZImageTransformer2DModel and its converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.checkpoint_layout import Layout, Part
from backend.families.zimage import FAMILY
from backend.families.zimage.identify import axis_widths
from backend.families.zimage.key_map import zimage_key_map
from backend.families.zimage.layers import pack, unpack
from backend.families.zimage.program import build_zimage_program
from backend.nn.padded_text import TEXT_LENGTHS
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
from tests.support.zimage_networks import CONFIG, TEXT_WIDTH, WIDTH, library_flow, make_zimage, original_tensors

LENGTHS = [40, 5]
"""Of two texts, padded to 64 and 32 tokens."""


def make_inputs() -> dict[str, Tensor]:
    return padded_text_inputs(LENGTHS, TEXT_WIDTH)


ZIMAGE = TinyFamily(family=FAMILY, config=CONFIG, make=make_zimage, original=original_tensors, inputs=make_inputs)


# files and names


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.float32), ("model.diffusion_model.", torch.float8_e4m3fn)], ids=["fp32", "fp8"])
def test_original_files_are_loaded(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    found = check_loading(ZIMAGE, tmp_path, original_tensors(make_zimage(), prefix), dtype)
    assert (found.part, found.context_width) == (Part(prefix, Layout.LDM), TEXT_WIDTH)


def test_diffusers_files_are_loaded(tmp_path: Path) -> None:
    tensors = {f"transformer.{key}": tensor for key, tensor in make_zimage().state_dict().items()}
    assert check_loading(ZIMAGE, tmp_path, tensors, torch.bfloat16).part == Part("transformer.", Layout.DIFFUSERS)


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_zimage())
    assert identify(ZIMAGE, tmp_path, {**tensors, "control_layers.0.weight": torch.zeros(2, 2)}) is None
    lumina = {key.replace("adaLN_modulation.0", "adaLN_modulation.1"): tensor for key, tensor in tensors.items()}
    assert identify(ZIMAGE, tmp_path, lumina) is None
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is Z-Image Omni"):
        identify(ZIMAGE, tmp_path, {**tensors, "siglip_embedder.0.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"looks like Z-Image, but lacks cap_embedder\.1\.weight"):
        identify(ZIMAGE, tmp_path, {key: one for key, one in tensors.items() if key != "cap_embedder.1.weight"})
    with pytest.raises(CheckpointError, match="128 inputs per token"):
        identify(ZIMAGE, tmp_path, {**tensors, "x_embedder.weight": torch.zeros(WIDTH, 128)})


def test_the_published_head_gets_the_published_axes() -> None:
    assert axis_widths(128) == [32, 48, 48] and axis_widths(16) == [4, 6, 6]
    assert all(sum(axis_widths(width)) == width and min(axis_widths(width)) > 0 for width in range(8, 260, 2))


def test_the_key_map_writes_original_files_that_the_library_converts() -> None:
    zimage = make_zimage()
    made, wanted, own = zimage_key_map(zimage).to_original(zimage.state_dict()), original_tensors(zimage), zimage.state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)
    converted = convert_z_image_transformer_checkpoint_to_diffusers(dict(made))
    assert converted.keys() == own.keys() and all(torch.equal(converted[key], own[key]) for key in own)


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(ZIMAGE, spelling)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(ZIMAGE, kind)


# the network


def make_rows() -> dict[str, Tensor]:
    inputs = make_inputs()
    return {"x": inputs["x"], "context": inputs["c_crossattn"], "timesteps": torch.tensor([0.9, 0.3]), TEXT_LENGTHS: inputs[TEXT_LENGTHS]}


def reference(zimage: Any, rows: dict[str, Tensor]) -> Tensor:
    texts = [text[:length] for text, length in zip(rows["context"], rows[TEXT_LENGTHS].tolist())]
    with torch.no_grad():
        return library_flow(zimage, rows["x"], texts, rows["timesteps"])


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_zimage_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize("lengths", [[40, 40], [32, 32], LENGTHS], ids=["padded", "full", "unlike"])
def test_the_fold_is_the_library_s_forward(lengths: list[int]) -> None:
    """Up to rounding, as the library rotates by complex products. Padding has learned tokens, and rows with longer texts other places."""
    rows = {**make_rows(), TEXT_LENGTHS: torch.tensor(lengths)}
    torch.testing.assert_close(run(ZIMAGE.build(), rows), reference(make_zimage(), rows), atol=2e-5, rtol=1e-5)


def test_what_does_not_count_changes_nothing() -> None:
    rows = make_rows()
    loud = {**rows, "context": rows["context"].clone()}
    loud["context"][1, LENGTHS[1] :] = 1e4
    assert torch.equal(run(ZIMAGE.build(), rows), run(ZIMAGE.build(), loud))


def test_odd_sides_are_padded_and_cropped() -> None:
    rows = make_rows()
    assert run(ZIMAGE.build(), {**rows, "x": rows["x"][..., :7, :5]}).shape == (2, 16, 7, 5)
    x = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(x), 5, 7), x)


def test_hooks_may_replace_a_block_and_residuals_are_added_to_the_picture() -> None:
    rows, seen = make_rows(), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(sorted(args))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("layer", 1): keep, ("context_refiner", 0): keep}}}
    assert torch.equal(run(ZIMAGE.build(), rows, options=hooks), run(ZIMAGE.build(), rows))
    assert seen == [["pe", "transformer_options", "txt", "vec"], ["img", "pe", "transformer_options", "vec"]]
    residual = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    network = ZIMAGE.build()
    named = build_zimage_program(network).name_residuals({"input": [None, residual]})
    assert [(one.number, one.target) for one in named] == [(1, "tokens")]
    assert (run(network, rows, residuals=named) - run(network, rows)).abs().max() > 1e-2


def test_in_fp16_streams_are_fp32_and_do_not_overflow() -> None:
    """A norm's weight of 6e4 lets a block add up to 3e5 to the stream. Reference: the library in fp32."""
    zimage, rows = make_zimage(), make_rows()
    zimage.layers[1].ffn_norm2.weight.fill_(6e4)
    zimage.layers[1].adaLN_modulation[0].bias[3 * WIDTH :] = 3.0
    wanted = reference(zimage, rows)
    network = ZIMAGE.build()
    state = zimage.state_dict()
    network.load_state_dict({key: state[key if key in state else zimage_key_map(network).original(key).key] for key in network.state_dict()})
    program = build_zimage_program(network.half())
    peak = 0.0
    with torch.no_grad():
        state = program.start({name: tensor.half() if name in ("x", "context") else tensor for name, tensor in rows.items()})
        for segment in program.segments:
            segment(state)
            peak = max(peak, float(state.tensors["tokens"].abs().max()) if "tokens" in state.tensors else 0.0)
    assert peak > torch.finfo(torch.float16).max
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 4), ("replicas", 2), ("tiles", 2)])
def test_several_slots_give_what_one_gives(strategy: str, count: int) -> None:
    check_slots(ZIMAGE, strategy, count)
