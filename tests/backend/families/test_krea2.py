"""Krea 2's files, names, network and LoRAs. References: diffusers' Krea2Transformer2DModel and its converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.checkpoint_layout import Layout, Part
from backend.families.krea2 import FAMILY
from backend.families.krea2.key_map import krea2_key_map
from backend.families.krea2.program import build_krea2_program
from backend.families.krea2.text import every_third
from backend.nn.padded_text import TEXT_LENGTHS
from tests.support.krea2_networks import CONFIG, TAPS, TEXT_WIDTH, library_flow, make_krea2, original_tensors
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
    return padded_text_inputs(LENGTHS, len(TAPS) * TEXT_WIDTH)


KREA2 = TinyFamily(family=FAMILY, config=CONFIG, make=make_krea2, original=original_tensors, inputs=make_inputs)


# files and names


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.float32), ("model.diffusion_model.", torch.float8_e4m3fn)], ids=["fp32", "fp8"])
def test_original_files_are_loaded(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    """A block's table is one row there."""
    found = check_loading(KREA2, tmp_path, original_tensors(make_krea2(), prefix), dtype)
    assert (found.part, found.context_width) == (Part(prefix, Layout.LDM), len(TAPS) * TEXT_WIDTH)


def test_diffusers_files_are_loaded(tmp_path: Path) -> None:
    tensors = {f"transformer.{key}": tensor for key, tensor in make_krea2().state_dict().items()}
    assert check_loading(KREA2, tmp_path, tensors, torch.bfloat16).part == Part("transformer.", Layout.DIFFUSERS)


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_krea2())
    assert identify(KREA2, tmp_path, {"first.weight": torch.zeros(2, 2)}) is None
    with pytest.raises(CheckpointError, match=r"looks like Krea 2, but lacks txtmlp\.1\.weight"):
        identify(KREA2, tmp_path, {key: one for key, one in tensors.items() if key != "txtmlp.1.weight"})
    with pytest.raises(CheckpointError, match="128 inputs per token"):
        identify(KREA2, tmp_path, {**tensors, "first.weight": torch.zeros(64, 128)})


def test_the_key_map_writes_original_files_that_the_library_converts() -> None:
    network = make_krea2()
    state = network.state_dict()
    made = krea2_key_map(network).to_original(state)
    assert made.keys() == original_tensors(network).keys()
    converted = convert_krea2_transformer_checkpoint_to_diffusers(original_tensors(network))
    assert converted.keys() == state.keys() and all(torch.equal(converted[key], state[key]) for key in state)


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(KREA2, spelling)


def test_the_published_layers_are_read() -> None:
    assert every_third(36) == (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35) and every_third(6) == TAPS


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(KREA2, kind)


# the network


def make_rows(**changes: Tensor) -> dict[str, Tensor]:
    inputs = make_inputs()
    return {
        "x": inputs["x"], "context": inputs["c_crossattn"], "timesteps": torch.tensor([0.9, 0.3]), TEXT_LENGTHS: inputs[TEXT_LENGTHS], **changes,
    }  # fmt: skip


def reference(network: Any, rows: dict[str, Tensor]) -> Tensor:
    mask = torch.arange(max(LENGTHS))[None] < rows[TEXT_LENGTHS][:, None]
    with torch.no_grad():
        return library_flow(network, rows["x"], rows["context"], rows["timesteps"], None if bool(mask.all()) else mask)


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_krea2_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize("lengths", [[9, 9], LENGTHS], ids=["alike", "unlike"])
def test_the_fold_is_the_library_s_forward(lengths: list[int]) -> None:
    rows = make_rows(**{TEXT_LENGTHS: torch.tensor(lengths)})
    torch.testing.assert_close(run(KREA2.build(), rows), reference(make_krea2(), rows), atol=2e-5, rtol=1e-5)


def test_what_does_not_count_changes_nothing() -> None:
    rows = make_rows()
    loud = {**rows, "context": rows["context"].clone()}
    loud["context"][1, LENGTHS[1] :] = 1e4
    assert torch.equal(run(KREA2.build(), rows), run(KREA2.build(), loud))


def test_odd_sides_are_padded_and_cropped() -> None:
    rows = make_rows()
    assert run(KREA2.build(), {**rows, "x": rows["x"][..., :7, :5]}).shape == (2, 16, 7, 5)


def test_hooks_may_replace_a_block() -> None:
    rows, seen = make_rows(), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(sorted(args))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("layer", 1): keep}}}
    assert torch.equal(run(KREA2.build(), rows, options=hooks), run(KREA2.build(), rows))
    assert seen == [["img", "pe", "transformer_options", "vec"]]


def test_in_fp16_the_stream_is_fp32_and_does_not_overflow() -> None:
    """A table's gate of 3e4 lets a block add more than fp16 holds to the stream. Reference: the library in fp32."""
    network, rows = make_krea2(), make_rows()
    network.transformer_blocks[1].scale_shift_table[5].fill_(3e4)
    network.transformer_blocks[1].ff.down.weight.mul_(8.0)
    wanted = reference(network, rows)
    program = build_krea2_program(network.half())
    with torch.no_grad():
        state = program.start({name: tensor.half() if name in ("x", "context") else tensor for name, tensor in rows.items()})
        peak = 0.0
        for segment in program.segments:
            segment(state)
            peak = max(peak, float(state.tensors["tokens"].abs().max()) if "tokens" in state.tensors else 0.0)
    assert peak > torch.finfo(torch.float16).max
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 4), ("replicas", 2), ("tiles", 2)])
def test_several_slots_give_what_one_gives(strategy: str, count: int) -> None:
    check_slots(KREA2, strategy, count)
