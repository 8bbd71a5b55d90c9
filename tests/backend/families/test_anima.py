"""Anima's files, names, network and LoRAs. References: diffusers' CosmosTransformer3DModel, AnimaTextConditioner and converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.checkpoint_layout import Layout, Part
from backend.families.anima import FAMILY
from backend.families.anima.key_map import anima_key_map
from backend.families.anima.program import build_anima_program
from backend.nn.padded_text import TEXT_LENGTHS
from backend.nn.second_text import SECOND_IDS, SECOND_LENGTHS, SECOND_WEIGHTS
from tests.support.anima_networks import CONFIG, LEAST_TEXT, SOURCE_WIDTH, library_flow, make_anima, original_tensors
from tests.support.tiny_families import (
    ADAPTERS,
    ORIGINAL_SPELLINGS,
    TinyFamily,
    check_adapter,
    check_loading,
    check_lora_spelling,
    check_slots,
    identify,
    padded_text_inputs,
)

LENGTHS, SECOND = [9, 5], [7, 12]
"""Of two texts, in Qwen3's tokens and in T5's."""


def make_inputs() -> dict[str, Tensor]:
    ids = torch.randint(0, 32128, (2, LEAST_TEXT), generator=torch.Generator().manual_seed(5))
    return {**padded_text_inputs(LENGTHS, SOURCE_WIDTH), SECOND_IDS: ids, SECOND_LENGTHS: torch.tensor(SECOND)}


ANIMA = TinyFamily(family=FAMILY, config=CONFIG, make=make_anima, original=original_tensors, inputs=make_inputs)


# files and names


@pytest.mark.parametrize(
    ("prefix", "dtype"), [("", torch.float32), ("net.", torch.bfloat16), ("model.diffusion_model.", torch.float8_e4m3fn)], ids=["fp32", "bf16", "fp8"]
)
def test_original_files_are_loaded(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    found = check_loading(ANIMA, tmp_path, original_tensors(make_anima(), prefix), dtype)
    assert (found.part, found.context_width) == (Part(prefix, Layout.LDM), SOURCE_WIDTH)


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_anima())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is Cosmos-Predict2, or Anima without its text conditioner"):
        identify(ANIMA, tmp_path, {key: one for key, one in tensors.items() if not key.startswith("llm_adapter.")})
    with pytest.raises(CheckpointError, match=r"looks like Anima, but lacks llm_adapter\.embed\.weight"):
        identify(ANIMA, tmp_path, {key: one for key, one in tensors.items() if key != "llm_adapter.embed.weight"})
    with pytest.raises(CheckpointError, match="64 inputs per token"):
        identify(ANIMA, tmp_path, {**tensors, "x_embedder.proj.1.weight": torch.zeros(48, 64)})


def test_the_key_map_writes_original_files_that_the_library_converts() -> None:
    network = make_anima()
    state, own = network.state_dict(), network.transformer.state_dict()
    made, wanted = anima_key_map(ANIMA.build()).to_original(state), original_tensors(network)
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)
    transformer = {f"net.{key}": tensor for key, tensor in made.items() if not key.startswith("llm_adapter.")}
    converted = convert_cosmos_transformer_checkpoint_to_diffusers(transformer)
    assert converted.keys() == own.keys() and all(torch.equal(converted[key], own[key]) for key in own)


@pytest.mark.parametrize("spelling", ORIGINAL_SPELLINGS)
def test_loras_of_every_spelling(spelling: str) -> None:
    """Of transformer and text conditioner."""
    check_lora_spelling(ANIMA, spelling)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(ANIMA, kind)


# the network


def make_rows(**changes: Tensor) -> dict[str, Tensor]:
    inputs = make_inputs()
    rows = {"x": inputs["x"], "context": inputs["c_crossattn"], "timesteps": torch.tensor([0.9, 0.3])}
    return {**rows, **{name: inputs[name] for name in (TEXT_LENGTHS, SECOND_IDS, SECOND_LENGTHS)}, **changes}


def reference(network: Any, rows: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return library_flow(network, rows["x"], rows, rows["timesteps"])


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_anima_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize("length", [LEAST_TEXT, 40, 600])
def test_the_fold_is_the_library_s_forward(length: int) -> None:
    """Texts of fewer tokens get zeros behind them up to 512."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32128, (2, length), generator=generator)
    rows = make_rows(**{SECOND_IDS: ids, SECOND_LENGTHS: torch.tensor([length, 12])})
    torch.testing.assert_close(run(ANIMA.build(), rows), reference(make_anima(), rows), atol=2e-5, rtol=1e-5)


def test_weights_multiply_what_tokens_become() -> None:
    rows = make_rows()
    ones = torch.ones(2, LEAST_TEXT)
    plain = run(ANIMA.build(), rows)
    assert torch.equal(run(ANIMA.build(), {**rows, SECOND_WEIGHTS: ones}), plain)
    heavy = ones.clone()
    heavy[:, 3] = 1.5
    assert (run(ANIMA.build(), {**rows, SECOND_WEIGHTS: heavy}) - plain).abs().mean() > 1e-4
    heavy = ones.clone()
    heavy[:, max(SECOND) :] = 7.0
    assert torch.equal(run(ANIMA.build(), {**rows, SECOND_WEIGHTS: heavy}), plain), "padding has no weight"


def test_what_does_not_count_changes_nothing() -> None:
    rows = make_rows()
    loud = {**rows, "context": rows["context"].clone(), SECOND_IDS: rows[SECOND_IDS].clone()}
    loud["context"][1, LENGTHS[1] :] = 1e4
    loud[SECOND_IDS][0, SECOND[0] :] = 5
    assert torch.equal(run(ANIMA.build(), rows), run(ANIMA.build(), loud))


def test_odd_sides_are_padded_and_cropped_and_a_missing_reading_is_named() -> None:
    rows = make_rows()
    assert run(ANIMA.build(), {**rows, "x": rows["x"][..., :7, :5]}).shape == (2, 16, 7, 5)
    with pytest.raises(ValueError, match="T5's tokens"):
        run(ANIMA.build(), {name: tensor for name, tensor in rows.items() if name != SECOND_IDS})


def test_hooks_may_replace_a_block() -> None:
    rows, seen = make_rows(), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(sorted(args))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("layer", 1): keep}}}
    assert torch.equal(run(ANIMA.build(), rows, options=hooks), run(ANIMA.build(), rows))
    assert seen == [["img", "pe", "transformer_options", "txt", "vec"]]


def test_in_fp16_the_stream_is_fp32_and_does_not_overflow() -> None:
    """A gate's matrix lets a block add more than fp16 holds to the stream. Reference: the library in fp32."""
    network, rows = make_anima(), make_rows()
    network.transformer.transformer_blocks[1].ff.net[2].weight.mul_(3e4)
    wanted = reference(network, rows)
    ours = ANIMA.build()
    ours.load_state_dict(network.state_dict())
    program = build_anima_program(ours.half())
    with torch.no_grad():
        state = program.start({name: tensor.half() if name in ("x", "context") else tensor for name, tensor in rows.items()})
        peak = 0.0
        for segment in program.segments:
            segment(state)
            peak = max(peak, float(state.tensors["tokens"].abs().max()) if "tokens" in state.tensors else 0.0)
    assert peak > 1e4 and bool(state.tensors["flow"].isfinite().all())
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 4), ("replicas", 2), ("tiles", 2), ("tiles", 3)])
def test_several_slots_give_what_one_gives(strategy: str, count: int) -> None:
    check_slots(ANIMA, strategy, count)
