"""Lumina2's files, names, network, text and LoRAs. References: diffusers' Lumina2Transformer2DModel and its converter, transformers' Gemma2Model, and
SentencePiece's rule of merging."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from safetensors.torch import save_file
from torch import Tensor

from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.checkpoint_layout import Layout, Part
from backend.families.gemma_text import read_gemma_tokenizer
from backend.families.lumina2 import FAMILY
from backend.families.lumina2.key_map import lumina2_key_map
from backend.families.lumina2.program import build_lumina2_program
from backend.families.lumina2.text import INSTRUCTION, build_text_engines, encode
from backend.nn.gemma2 import Gemma2Shape, Gemma2TextEncoder, gemma2_config
from backend.nn.padded_text import TEXT_LENGTHS
from backend.text_processing.gemma_tokenizer import build_gemma_tokenizer
from backend.text_processing.sentencepiece_file import read_sentencepiece
from backend.text_processing.textual_inversion import EmbeddingDatabase
from tests.support.flow_pictures import Prompts
from tests.support.lumina2_networks import (
    CONFIG,
    TEXT_WIDTH,
    WIDTH,
    gemma2_encoder,
    library_flow,
    make_lumina2,
    original_tensors,
    pieces,
    spiece_model,
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

LENGTHS = [12, 5]


def make_inputs() -> dict[str, Tensor]:
    return padded_text_inputs(LENGTHS, TEXT_WIDTH)


LUMINA = TinyFamily(family=FAMILY, config=CONFIG, make=make_lumina2, original=original_tensors, inputs=make_inputs)


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.float32), ("model.diffusion_model.", torch.float8_e4m3fn)], ids=["fp32", "fp8"])
def test_original_files_are_loaded(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    found = check_loading(LUMINA, tmp_path, original_tensors(make_lumina2(), prefix), dtype)
    assert (found.part, found.context_width) == (Part(prefix, Layout.LDM), TEXT_WIDTH)


def test_diffusers_files_are_loaded(tmp_path: Path) -> None:
    tensors = {f"transformer.{key}": tensor for key, tensor in make_lumina2().state_dict().items()}
    assert check_loading(LUMINA, tmp_path, tensors, torch.bfloat16).part == Part("transformer.", Layout.DIFFUSERS)


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_lumina2())
    zimage = {key.replace("adaLN_modulation.1", "adaLN_modulation.0"): tensor for key, tensor in tensors.items()}
    assert identify(LUMINA, tmp_path, zimage) is None
    with pytest.raises(CheckpointError, match=r"model\.safetensors: looks like Lumina2, but lacks cap_embedder\.1\.weight"):
        identify(LUMINA, tmp_path, {key: one for key, one in tensors.items() if key != "cap_embedder.1.weight"})
    with pytest.raises(CheckpointError, match="128 inputs per token"):
        identify(LUMINA, tmp_path, {**tensors, "x_embedder.weight": torch.zeros(WIDTH, 128)})


def test_the_key_map_writes_original_files_that_the_library_converts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter splits qkv by the published widths, which are replaced here; `norm_final` of published files is used by nobody."""
    lumina = make_lumina2()
    made, wanted, own = lumina2_key_map(lumina).to_original(lumina.state_dict()), original_tensors(lumina), lumina.state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)
    inner = next(one for one in convert_lumina2_to_diffusers.__code__.co_consts if hasattr(one, "co_consts") and "attn" in one.co_name)
    changed = inner.replace(co_consts=tuple({2304: WIDTH, 768: 24}.get(one, one) for one in inner.co_consts))
    outer = convert_lumina2_to_diffusers.__code__
    monkeypatch.setattr(
        convert_lumina2_to_diffusers, "__code__", outer.replace(co_consts=tuple(changed if one is inner else one for one in outer.co_consts))
    )
    converted = convert_lumina2_to_diffusers({**made, "norm_final.weight": torch.zeros(2)})
    assert converted.keys() == own.keys() and all(torch.equal(converted[key], own[key]) for key in own)


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(LUMINA, spelling)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(LUMINA, kind)


# the network


def make_rows() -> dict[str, Tensor]:
    inputs = make_inputs()
    return {"x": inputs["x"], "context": inputs["c_crossattn"], "timesteps": torch.tensor([0.9, 0.3]), TEXT_LENGTHS: inputs[TEXT_LENGTHS]}


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_lumina2_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize("lengths", [[12, 12], LENGTHS], ids=["alike", "unlike"])
def test_the_fold_is_the_library_s_forward(lengths: list[int]) -> None:
    """Up to rounding, as the library rotates by complex products. Rows with longer texts have other places."""
    rows = {**make_rows(), TEXT_LENGTHS: torch.tensor(lengths)}
    with torch.no_grad():
        wanted = library_flow(make_lumina2(), rows["x"], rows["context"], lengths, rows["timesteps"])
    torch.testing.assert_close(run(LUMINA.build(), rows), wanted, atol=2e-5, rtol=1e-5)


def test_what_does_not_count_changes_nothing_and_odd_sides_are_padded() -> None:
    rows = make_rows()
    loud = {**rows, "context": rows["context"].clone()}
    loud["context"][1, LENGTHS[1] :] = 1e4
    assert torch.equal(run(LUMINA.build(), rows), run(LUMINA.build(), loud))
    assert run(LUMINA.build(), {**rows, "x": rows["x"][..., :7, :5]}).shape == (2, 16, 7, 5)


def test_hooks_may_replace_a_block() -> None:
    rows, seen = make_rows(), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(sorted(args))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("layer", 1): keep, ("context_refiner", 0): keep}}}
    assert torch.equal(run(LUMINA.build(), rows, options=hooks), run(LUMINA.build(), rows))
    assert seen == [["pe", "transformer_options", "txt", "vec"], ["img", "pe", "transformer_options", "vec"]]


def test_in_fp16_streams_are_fp32_and_do_not_overflow() -> None:
    """A norm's weight of 6e4 lets a block add up to 3e5 to the stream. Reference: the library in fp32."""
    lumina, rows, peak = make_lumina2(), make_rows(), 0.0
    lumina.layers[1].ffn_norm2.weight.fill_(6e4)
    lumina.layers[1].norm1.linear.bias[3 * WIDTH :] = 3.0
    network = LUMINA.build()
    network.load_state_dict(lumina.state_dict())
    with torch.no_grad():
        wanted = library_flow(lumina, rows["x"], rows["context"], LENGTHS, rows["timesteps"])
        program = build_lumina2_program(network.half())
        state = program.start({name: tensor.half() if name in ("x", "context") else tensor for name, tensor in rows.items()})
        for segment in program.segments:
            segment(state)
            peak = max(peak, float(state.tensors["tokens"].abs().max()) if "tokens" in state.tensors else 0.0)
    assert peak > torch.finfo(torch.float16).max
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 3), ("replicas", 2), ("tiles", 3)])
def test_several_slots_give_what_one_gives(strategy: str, count: int) -> None:
    check_slots(LUMINA, strategy, count)


# text


def tokenizer() -> Any:
    return build_gemma_tokenizer(read_sentencepiece(spiece_model()))


def merged_by_score(text: str) -> list[int]:
    """SentencePiece's rule: of all neighbors that make a piece, the pair with the best score becomes one, from the left, until there is none."""
    ids = {piece: number for number, (piece, _, _) in enumerate(pieces())}
    scores = {piece: score for piece, score, kind in pieces() if kind == 1}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[parts[at] + parts[at + 1]], -at) for at in range(len(parts) - 1) if parts[at] + parts[at + 1] in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [number for part in parts for number in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])]


@pytest.mark.parametrize("text", ["a red cat and the other cat", "  a  cat", "rering, <Prompt Start> the cating!", "Größe cat", ""])
def test_ids_are_those_of_sentencepiece_s_rule(text: str) -> None:
    assert tokenizer()([text], add_special_tokens=False)["input_ids"][0] == merged_by_score(text)


def test_markers_are_kept_whole() -> None:
    assert tokenizer()(["<bos>cat\n\ncat"], add_special_tokens=False)["input_ids"][0] == [2, *merged_by_score("cat"), 5, *merged_by_score("cat")]


def own_encoder() -> Any:
    config = gemma2_encoder().config
    shape = Gemma2Shape(
        vocab_length=config.vocab_size, width=config.hidden_size, inner_width=config.intermediate_size, num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, head_width=config.head_dim, num_layers=config.num_hidden_layers,
    )  # fmt: skip
    encoder = Gemma2TextEncoder(gemma2_config(shape))
    encoder.load_state_dict(gemma2_encoder().state_dict())
    return encoder.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_are_those_before_transformers_last_layer(dtype: torch.dtype) -> None:
    ids = torch.tensor([[2, 300, 17, 265, 270, 280, 290]])
    with torch.no_grad():
        wanted = gemma2_encoder()(ids, output_hidden_states=True).hidden_states[-2]
        found = own_encoder().to(dtype)(ids)
    assert found.dtype == torch.float32
    if dtype is torch.float32:
        torch.testing.assert_close(found, wanted)
    else:
        assert (found - wanted).abs().max() < (0.1 if dtype is torch.bfloat16 else 0.02) * wanted.abs().max()


def test_prompts_stand_behind_their_instruction() -> None:
    engines = build_text_engines({"gemma2": own_encoder()}, {"gemma2": tokenizer()}, EmbeddingDatabase(None, {}))
    side: Any = SimpleNamespace(run_text_engine=lambda index, texts: engines[index](texts))
    negative = Prompts(["red cat"])
    negative.is_negative_prompt = True
    for prompt, text in (
        (Prompts(["red cat"]), f"{INSTRUCTION} <Prompt Start> red cat"), (Prompts(["the <Prompt Start> cat"]), "the <Prompt Start> cat"),
        (negative, "red cat"),
    ):  # fmt: skip
        conditions = encode(side, prompt)
        ids = torch.tensor([[2, *merged_by_score(text)]])
        assert conditions[TEXT_LENGTHS].tolist() == [ids.shape[1]]
        torch.testing.assert_close(conditions["crossattn"], own_encoder()(ids))


def test_a_file_without_a_sound_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "gemma.safetensors"
    for tensors, words in (
        ({"weight": torch.zeros(2)}, "comes without its tokenizer"),
        ({"spiece_model": torch.zeros(2, 2, dtype=torch.uint8)}, "spiece_model is no tokenizer"),
        ({"spiece_model": torch.zeros(2)}, "spiece_model is no tokenizer"),
        ({"spiece_model": torch.full((9,), 255, dtype=torch.uint8)}, "its tokenizer cannot be read"),
    ):
        save_file(tensors, path)
        with open_tensor_file(path) as file, pytest.raises(CheckpointError, match=rf"gemma\.safetensors: .*{words}"):
            read_gemma_tokenizer(file, Part("", Layout.TRANSFORMERS, "gemma2"))
