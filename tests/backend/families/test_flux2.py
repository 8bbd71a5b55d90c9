"""Flux.2-klein's files, names, network, tiles, schedule and LoRAs. References: diffusers' Flux2Transformer2DModel, converter and pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from transformers import Qwen3Config

from backend.checkpoint_file import CheckpointError
from backend.checkpoint_layout import Layout, Part
from backend.families.flux2 import FAMILY, mu_of
from backend.families.flux2.key_map import flux2_key_map
from backend.families.flux2.program import build_flux2_program
from backend.families.flux2.text import build_text_engines, quarters
from backend.families.latent_format import LatentFormat
from backend.nn.network_call import NetworkCall
from backend.nn.padded_text import TEXT_LENGTHS
from backend.nn.qwen3 import Qwen3TextEncoder
from backend.patcher.lora_files import LoraError
from backend.text_processing.textual_inversion import EmbeddingDatabase
from tests.support.flux2_networks import CONFIG, QWEN_WIDTH, TEXT_WIDTH, WIDTH, library_flow, make_flux2, original_tensors
from tests.support.tiles import run_program_in_tiles
from tests.support.tiny_families import (
    ADAPTERS,
    LIBRARY_SPELLINGS,
    ORIGINAL_SPELLINGS,
    TinyFamily,
    apply_file,
    check_adapter,
    check_loading,
    check_lora_spelling,
    check_slots,
    identify,
)
from tests.support.zimage_networks import qwen3_encoder, qwen_tokenizer

TEXTS = 9


def make_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(2, 128, 4, 3, generator=generator),
        "t": torch.tensor([0.75, 0.75]),
        "c_crossattn": torch.randn(2, TEXTS, TEXT_WIDTH, generator=generator),
        TEXT_LENGTHS: torch.tensor([TEXTS, TEXTS]),
    }


FLUX2 = TinyFamily(family=FAMILY, config=CONFIG, make=make_flux2, original=original_tensors, inputs=make_inputs)


# files and names


@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.float32), ("model.diffusion_model.", torch.float8_e4m3fn)], ids=["fp32", "fp8"])
def test_original_files_are_loaded(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    found = check_loading(FLUX2, tmp_path, original_tensors(make_flux2(), prefix), dtype)
    assert (found.part, found.context_width) == (Part(prefix, Layout.LDM), TEXT_WIDTH)


def test_diffusers_files_and_norms_called_weights_are_loaded(tmp_path: Path) -> None:
    tensors = {f"transformer.{key}": tensor for key, tensor in make_flux2().state_dict().items()}
    assert check_loading(FLUX2, tmp_path, tensors, torch.bfloat16).part == Part("transformer.", Layout.DIFFUSERS)
    renamed = {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in original_tensors(make_flux2()).items()}
    check_loading(FLUX2, tmp_path, renamed, torch.float32)


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_flux2())
    assert identify(FLUX2, tmp_path, {key: one for key, one in tensors.items() if "modulation_img" not in key}) is None
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is Flux\.2-dev, whose text encoder \(Mistral\) is not supported"):
        identify(FLUX2, tmp_path, {**tensors, "guidance_in.in_layer.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"looks like Flux\.2-klein, but lacks txt_in\.weight"):
        identify(FLUX2, tmp_path, {key: one for key, one in tensors.items() if key != "txt_in.weight"})
    with pytest.raises(CheckpointError, match="64 inputs per token"):
        identify(FLUX2, tmp_path, {**tensors, "img_in.weight": torch.zeros(WIDTH, 64)})
    with pytest.raises(CheckpointError, match="heads 12 wide"):
        identify(FLUX2, tmp_path, {**tensors, "double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(12)})


def test_the_key_map_writes_original_files_that_the_library_converts() -> None:
    flux2 = make_flux2()
    made, wanted, own = flux2_key_map(flux2).to_original(flux2.state_dict()), original_tensors(flux2), flux2.state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)
    converted = convert_flux2_transformer_checkpoint_to_diffusers(dict(made))
    assert converted.keys() == own.keys() and all(torch.equal(converted[key], own[key]) for key in own)


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(FLUX2, spelling)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(FLUX2, kind)


def test_a_lora_of_flux_1_is_refused_by_name() -> None:
    """It has the same names for most of its layers."""
    file = {}
    for name, shape in (("double_blocks_0_img_mod_lin", (6 * WIDTH, WIDTH)), ("single_blocks_0_linear1", (7 * WIDTH, WIDTH))):
        file |= {f"lora_unet_{name}.lora_up.weight": torch.zeros(shape[0], 2), f"lora_unet_{name}.lora_down.weight": torch.zeros(2, shape[1])}
    with pytest.raises(LoraError, match=r"does not fit Flux\.2-klein: .*It seems to be made for Flux\.1; choose a checkpoint of that family"):
        apply_file(FLUX2, file)
    own = {"diffusion_model.single_stream_modulation.lin.lora_B.weight": torch.zeros(5, 2)}
    own |= {"diffusion_model.single_stream_modulation.lin.lora_A.weight": torch.zeros(2, 7)}
    with pytest.raises(LoraError, match=r"does not fit Flux\.2-klein: 1 of its 1 layers do not fit .*It may be for another model family"):
        apply_file(FLUX2, own)


# the network


def make_rows(*, references: int = 0) -> dict[str, Tensor]:
    inputs, generator = make_inputs(), torch.Generator().manual_seed(6)
    rows = {"x": inputs["x"], "context": inputs["c_crossattn"], "timesteps": torch.tensor([0.9, 0.3]), TEXT_LENGTHS: inputs[TEXT_LENGTHS]}
    sizes = [(2, 5), (3, 2)][:references]
    return rows | {f"reference_{number}": torch.randn(1, 128, *size, generator=generator) for number, size in enumerate(sizes, 1)}


def reference(flux2: Any, rows: dict[str, Tensor]) -> Tensor:
    references = tuple(tensor for name, tensor in rows.items() if name.startswith("reference"))
    with torch.no_grad():
        return library_flow(flux2, rows["x"], rows["context"], rows["timesteps"], references)


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_flux2_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize("references", [0, 1, 2])
def test_the_fold_is_the_library_s_forward_bit_for_bit(references: int) -> None:
    rows = make_rows(references=references)
    assert torch.equal(run(FLUX2.build(), rows), reference(make_flux2(), rows))


def test_rows_with_texts_of_unlike_lengths_run_together() -> None:
    """Parts between BREAKs make texts longer. What does not count is not read."""
    rows = make_rows()
    unlike = {**rows, TEXT_LENGTHS: torch.tensor([TEXTS, 5])}
    loud = {**unlike, "context": rows["context"].clone()}
    loud["context"][1, 5:] = 1e4
    found = run(FLUX2.build(), loud)
    assert torch.equal(found, run(FLUX2.build(), unlike))
    for row, length in enumerate((TEXTS, 5)):
        alone = {name: tensor[row : row + 1] for name, tensor in rows.items() if name != TEXT_LENGTHS}
        alone["context"] = alone["context"][:, :length]
        torch.testing.assert_close(found[row : row + 1], reference(make_flux2(), alone), atol=2e-5, rtol=1e-5)


def test_hooks_may_replace_a_block_and_residuals_are_added_to_the_picture() -> None:
    rows, seen = make_rows(references=1), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append((sorted(args), tuple(args["vec"].shape)))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("double_block", 1): keep, ("single_block", 0): keep}}}
    assert torch.equal(run(FLUX2.build(), rows, options=hooks), run(FLUX2.build(), rows))
    assert [shape for _, shape in seen] == [(2, 12, WIDTH), (2, 3, WIDTH)] and "txt" in seen[0][0] and "txt" not in seen[1][0]
    network, residual = FLUX2.build(), torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    named = build_flux2_program(network).name_residuals({"input": [None, residual], "output": [residual]})
    assert [(one.kind, one.number, one.target) for one in named] == [("input", 1, "image"), ("output", 0, "tokens")]
    assert (run(network, rows, residuals=named) - run(network, rows)).abs().max() > 1e-2


def test_in_fp16_streams_and_products_do_not_overflow() -> None:
    """MLPs whose products reach 1e6. Reference: the library in fp32."""
    flux2, rows = make_flux2(), make_rows()
    for block in flux2.transformer_blocks:
        block.ff.linear_in.weight.mul_(200)
    for block in flux2.single_transformer_blocks:
        block.attn.to_qkv_mlp_proj.weight[3 * WIDTH :].mul_(200)
    wanted = reference(flux2, rows)
    network = FLUX2.build()
    network.load_state_dict(flux2.state_dict())
    half = {name: tensor.half() if name in ("x", "context") else tensor for name, tensor in rows.items()}
    made = run(network.half(), half)
    assert made.isfinite().all() and (made.float() - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 4), ("replicas", 2)])
def test_several_slots_give_what_one_gives(strategy: str, count: int) -> None:
    check_slots(FLUX2, strategy, count)


@pytest.mark.parametrize("tiles", [(2, 2), (1, 3)], ids=str)
def test_tiles_are_the_whole(tiles: tuple[int, ...]) -> None:
    """In fp64, so that only a wrong token is visible; RoPE tables are fp32 in both."""
    program = build_flux2_program(nn.Module.to(FLUX2.build(), torch.float64))
    assert program.why_no_tiles() is None
    for lengths in ([TEXTS, TEXTS], [TEXTS, 5]):
        rows = {name: one.double() if name in ("x", "context") else one for name, one in make_rows().items()} | {TEXT_LENGTHS: torch.tensor(lengths)}
        call = NetworkCall(rows=rows)
        with torch.no_grad():
            expected = program.run(call.start(program))
        found, peers, _ = run_program_in_tiles(program, call, tiles)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))
        assert [one.num_posts for one in peers] == [program.tile_traffic(rows).num_exchanges] * len(tiles)


# text


def test_padding_is_read_and_reads_nothing_of_itself() -> None:
    """transformers' own model with its mask; the published layers are a quarter, a half and three quarters of 36."""
    assert quarters(36) == (9, 18, 27)
    library, tokenizer, no_embeddings = qwen3_encoder(width=QWEN_WIDTH, layers=4), qwen_tokenizer(), cast("EmbeddingDatabase", None)
    ours = Qwen3TextEncoder(library.config, quarters(4))
    ours.load_state_dict(library.state_dict())
    engine: Any = build_text_engines({"qwen3": ours}, {"qwen3": tokenizer}, no_embeddings)[0]
    text_BLD, lengths_B = engine(["a red cat", "dog"])
    assert text_BLD.shape == (2, 512, TEXT_WIDTH) and lengths_B.tolist() == [512, 512]
    for row, prompt in enumerate(("a red cat", "dog")):
        whole = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        mask = torch.tensor([[1] * len(ids) + [0] * (512 - len(ids))])
        padded = torch.tensor([ids + [151_643] * (512 - len(ids))])
        with torch.no_grad():
            states = library(padded, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
        torch.testing.assert_close(text_BLD[row], torch.cat([states[number][0] for number in (1, 2, 3)], dim=-1), atol=1e-4, rtol=1e-4)
    longer, _ = engine(["word " * 600])
    assert longer.shape[1] > 600, "a longer text is not cut"
    assert engine(["cat BREAK dog"])[0].shape[1] == 1024


def test_the_default_reads_the_layer_before_the_last() -> None:
    config = Qwen3Config(vocab_size=32, hidden_size=8, num_hidden_layers=3)
    assert Qwen3TextEncoder(config).reads == (2,)


# latents and noise levels


def test_latents_are_folded_channel_by_channel() -> None:
    from diffusers import Flux2KleinPipeline

    format_ = LatentFormat(channels=128, factor=16, fold=2, shift=tuple(map(float, range(128))), scale=tuple(1 + 0.1 * n for n in range(128)))
    z = torch.randn(2, 32, 6, 4, generator=torch.Generator().manual_seed(0))
    shift, scale = (torch.tensor(one)[:, None, None] for one in (format_.shift, format_.scale))
    torch.testing.assert_close(format_.from_vae(z), (Flux2KleinPipeline._patchify_latents(z) - shift) * scale)
    torch.testing.assert_close(format_.to_vae(format_.from_vae(z)), z, atol=1e-4, rtol=1e-4)
    assert (format_.vae_channels, format_.vae_factor, format_.multiple_px) == (32, 8, 16)
    with pytest.raises(ValueError, match="fold is 3, so channels must be a multiple of 9"):
        LatentFormat(channels=128, factor=16, scale=1.0, fold=3)


@pytest.mark.parametrize(("tokens", "steps"), [(4096, 4), (4096, 50), (1024, 20), (4300, 4), (4301, 4), (16384, 20)])
def test_the_shift_is_the_authors(tokens: int, steps: int) -> None:
    assert mu_of(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-6)
