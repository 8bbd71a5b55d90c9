"""Chroma's files, names, network, text and LoRAs. References: diffusers' ChromaTransformer2DModel, its converter, its pipeline's text recipe."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers
from torch import Tensor, nn

from backend.checkpoint_file import CheckpointError
from backend.checkpoint_layout import Layout
from backend.families.chroma import FAMILY
from backend.families.chroma.key_map import chroma_key_map
from backend.families.chroma.program import build_chroma_program
from backend.families.chroma.text import build_text_engines, encode
from backend.nn.network_call import NetworkCall
from backend.nn.padded_text import TEXT_LENGTHS
from backend.text_processing.textual_inversion import EmbeddingDatabase
from tests.support.chroma_networks import CONFIG, WIDTH, library_flow, make_chroma, original_tensors
from tests.support.t5_encoders import t5_encoder, t5_tokenizer
from tests.support.tiles import run_program_in_tiles
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
)


def make_inputs() -> dict[str, Tensor]:
    """Two rows whose texts have 9 and 5 tokens that count."""
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(2, 16, 8, 8, generator=generator),
        "t": torch.tensor([0.75, 0.75]),
        "c_crossattn": torch.randn(2, 9, CONFIG["joint_attention_dim"], generator=generator),
        TEXT_LENGTHS: torch.tensor([9, 5]),
    }


CHROMA = TinyFamily(family=FAMILY, config=CONFIG, make=make_chroma, original=original_tensors, inputs=make_inputs)


@pytest.mark.parametrize("tiles", [(2, 2), (1, 3), (1, 1, 2)], ids=str)
def test_tiles_of_rows_with_padded_texts_are_the_whole(tiles: tuple[int, ...]) -> None:
    """In fp64, so that only a wrong token or mask is visible."""
    program = build_chroma_program(nn.Module.to(make_chroma(), torch.float64))
    assert program.why_no_tiles() is None
    named = {"x": "x", "timesteps": "t", "context": "c_crossattn", TEXT_LENGTHS: TEXT_LENGTHS}
    inputs = make_inputs()
    call = NetworkCall(rows={name: inputs[key].double() if name in ("x", "context") else inputs[key] for name, key in named.items()})
    with torch.no_grad():
        expected = program.run(call.start(program))
    found, _, _ = run_program_in_tiles(program, call, tiles)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))


# files and names


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
def test_original_files_are_loaded(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    found = check_loading(CHROMA, tmp_path, original_tensors(make_chroma(), prefix), dtype)
    assert (found.part.prefix, found.part.layout, found.context_width) == (prefix, Layout.LDM, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_diffusers_files_and_files_with_weights_for_scales_are_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    assert check_loading(CHROMA, tmp_path, {f"transformer.{key}": one for key, one in make_chroma().state_dict().items()}, dtype).part.prefix
    original = {key.removesuffix("scale") + "weight" if key.endswith("scale") else key: one for key, one in original_tensors(make_chroma()).items()}
    check_loading(CHROMA, tmp_path, original, dtype)


def test_the_published_shape_is_read_from_shapes(tmp_path: Path) -> None:
    """Names and numbers of channels as a Chroma1 file has them, of two blocks each; the tensors' numbers do not matter."""
    original = original_tensors(make_chroma(approximator_num_channels=64, approximator_layers=5, num_layers=3))
    found = identify(CHROMA, tmp_path, original)
    assert found is not None
    assert [found.config[name] for name in ("approximator_num_channels", "approximator_layers", "num_layers", "num_single_layers")] == [64, 5, 3, 3]


def test_radiance_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_chroma())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is Chroma Radiance.*use Chroma1-HD"):
        identify(CHROMA, tmp_path, {**tensors, "nerf_blocks.0.norm.scale": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"looks like Chroma, but lacks txt_in\.weight"):
        identify(CHROMA, tmp_path, {key: one for key, one in tensors.items() if key != "txt_in.weight"})
    with pytest.raises(CheckpointError, match="128 inputs per token"):
        identify(CHROMA, tmp_path, {**tensors, "img_in.weight": torch.zeros(WIDTH, 128)})
    with pytest.raises(CheckpointError, match=r"img_in\.weight has the shape 48, which no Chroma has"):
        identify(CHROMA, tmp_path, {**tensors, "img_in.weight": torch.zeros(WIDTH)})
    assert identify(CHROMA, tmp_path, {key: one for key, one in tensors.items() if "distilled" not in key}) is None


def test_the_library_s_converter_agrees_where_it_has_no_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter splits linear1 by the published width, which this test replaces."""
    chroma = make_chroma()
    source = convert_chroma_transformer_checkpoint_to_diffusers.__code__
    constants = tuple({3072: WIDTH}.get(one, one) for one in source.co_consts)
    monkeypatch.setattr(convert_chroma_transformer_checkpoint_to_diffusers, "__code__", source.replace(co_consts=constants))
    made = chroma_key_map(chroma).to_original(chroma.state_dict())
    wanted = original_tensors(chroma)
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)
    converted, own = convert_chroma_transformer_checkpoint_to_diffusers(made), chroma.state_dict()
    assert converted.keys() == own.keys() and all(torch.equal(converted[key], own[key]) for key in own)


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(CHROMA, spelling)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(CHROMA, kind)


# the network


def make_rows() -> dict[str, Tensor]:
    inputs = make_inputs()
    return {"x": inputs["x"], "context": inputs["c_crossattn"], "timesteps": torch.tensor([0.9, 0.3])}


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_chroma_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


def test_the_fold_is_the_library_s_forward_bit_for_bit() -> None:
    rows = make_rows()
    with torch.no_grad():
        wanted = library_flow(make_chroma(), rows)
    assert torch.equal(run(CHROMA.build(), rows), wanted)


def test_padding_changes_nothing_beside_a_longer_text() -> None:
    """Each row is what it is alone, whatever numbers the padding has."""
    rows, lengths = make_rows(), [9, 5]
    rows["context"][1, 5:] = 1e4
    together = run(CHROMA.build(), {**rows, TEXT_LENGTHS: torch.tensor(lengths)})
    for row, length in enumerate(lengths):
        alone = {name: tensor[row : row + 1] for name, tensor in rows.items()}
        alone["context"] = alone["context"][:, :length]
        torch.testing.assert_close(together[row : row + 1], run(CHROMA.build(), alone), atol=1e-5, rtol=0)
    assert (together - run(CHROMA.build(), rows)).abs().max() > 1e-3, "without lengths the padding counts"


def test_in_fp16_streams_are_fp32_and_do_not_overflow() -> None:
    """The second single block's gate is 6e4, so it adds 1.8e5 to the stream. Reference: the library in fp32."""
    chroma, network, rows, peak = make_chroma(), CHROMA.build(), make_rows(), 0.0
    chroma.single_transformer_blocks[1].proj_out.bias.fill_(3.0)
    network.load_state_dict(chroma.state_dict())
    for one in (chroma, network):
        one.distilled_guidance_layer.register_forward_hook(lambda layer, inputs, out: out.index_fill(1, torch.tensor([3 + 2]), 6e4))
    with torch.no_grad():
        wanted = library_flow(chroma, rows)
        program = build_chroma_program(network.half())
        state = program.start({name: tensor if name == "timesteps" else tensor.half() for name, tensor in rows.items()})
        for segment in program.segments:
            segment(state)
            peak = max([peak, *(float(state.tensors[name].abs().max()) for name in ("image", "tokens") if name in state.tensors)])
    assert state.tensors["modulation"].dtype == torch.float16 and peak > torch.finfo(torch.float16).max
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_hooks_may_replace_a_block() -> None:
    rows, seen = make_rows(), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append((sorted(args), tuple(args["vec"].shape)))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("double_block", 1): keep, ("single_block", 2): keep}}}
    assert torch.equal(run(CHROMA.build(), rows, options=hooks), run(CHROMA.build(), rows))
    assert seen == [
        (["attn_mask", "img", "pe", "transformer_options", "txt", "vec"], (2, 12, WIDTH)),
        (["attn_mask", "img", "pe", "transformer_options", "vec"], (2, 3, WIDTH)),
    ]


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 4), ("replicas", 2), ("tiles", 2)])
def test_several_slots_give_what_one_gives(strategy: str, count: int) -> None:
    check_slots(CHROMA, strategy, count)


def test_weights_in_fp8_split_as_they_are() -> None:
    check_slots(CHROMA, "layers", 3, torch.float8_e4m3fn)


# text


def side() -> Any:
    engines = build_text_engines({"t5xxl": t5_encoder()}, {"t5xxl": t5_tokenizer()}, EmbeddingDatabase(None, {}))
    return SimpleNamespace(run_text_engine=lambda index, prompt: engines[index](prompt), engines=engines)


def test_features_are_the_pipeline_s_of_what_its_mask_keeps() -> None:
    """The prompt, its end, and one token of padding."""
    prompts = ["a photo of an astronaut riding a horse on mars", "", "red green " * 50]
    pipe: Any = ChromaPipeline.__new__(ChromaPipeline)
    pipe.__dict__["text_encoder"] = t5_encoder()
    pipe.tokenizer = t5_tokenizer()
    features, mask = pipe._get_t5_prompt_embeds(prompts, device=torch.device("cpu"), max_sequence_length=128)
    conditions = encode(side(), prompts)
    assert conditions[TEXT_LENGTHS].tolist() == mask.sum(dim=1).tolist()
    for row, length in enumerate(conditions[TEXT_LENGTHS].tolist()):
        torch.testing.assert_close(conditions["crossattn"][row, :length], features[row, :length])
        assert not conditions["crossattn"][row, length:].any()


def test_parts_after_a_break_follow_without_padding_between_prompts() -> None:
    alone = [encode(side(), [text]) for text in ("red cat", "blue dog")]
    together = encode(side(), ["red cat BREAK blue dog"])
    torch.testing.assert_close(together["crossattn"], torch.cat([one["crossattn"] for one in alone], dim=1))
    assert side().engines[0].get_prompt_lengths("cat dog bird") == (3, 511)
