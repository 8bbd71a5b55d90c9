"""SD3's files, names, network and LoRAs. References: diffusers' SD3Transformer2DModel and its converter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor, nn

from backend.checkpoint_file import CheckpointError
from backend.checkpoint_layout import Layout, Part
from backend.families.sd3 import FAMILY
from backend.families.sd3.key_map import sd3_key_map
from backend.families.sd3.program import build_sd3_program
from backend.nn.network_call import NetworkCall
from backend.nn.program import Addition
from tests.support.sd3_networks import CONFIG, PLAIN, WIDTH, make_sd3, original_tensors
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
    generator = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(2, 16, 8, 8, generator=generator),
        "t": torch.tensor([0.75, 0.75]),
        "c_crossattn": torch.randn(2, 9, CONFIG["joint_attention_dim"], generator=generator),
        "y": torch.randn(2, CONFIG["pooled_projection_dim"], generator=generator),
    }


SD35 = TinyFamily(family=FAMILY, config=CONFIG, make=make_sd3, original=original_tensors, inputs=make_inputs)
SD3 = replace(SD35, config={**CONFIG, **PLAIN}, make=lambda: make_sd3(**PLAIN))
KINDS = {"SD3.5 medium": SD35, "SD3 medium": SD3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "tiles", "skipped"), [(8, (2, 2), ()), (7, (1, 3), (1,)), (9, (1, 2, 2), (2,))], ids=str)
def test_tiles_are_the_whole(kind: str, height: int, tiles: tuple[int, ...], skipped: tuple[int, ...]) -> None:
    """In fp64, so that only a wrong token is visible; with residuals after blocks, and with blocks left out."""
    program = build_sd3_program(nn.Module.to(KINDS[kind].make(), torch.float64))
    assert program.why_no_tiles() is None
    inputs, generator = {name: tensor.double() for name, tensor in make_inputs().items()}, torch.Generator().manual_seed(6)
    rows = {"x": torch.randn(2, 16, height, 6, generator=generator).double(), "timesteps": 1000 * inputs["t"]}
    width = program.embedding.network.inner_dim
    residual = torch.randn(2, 3 * sum(tiles), width, generator=generator).double()
    call = NetworkCall(
        rows={**rows, "context": inputs["c_crossattn"], "y": inputs["y"]}, control={"output": [residual, None]}, options={"skip_layers": skipped}
    )
    with torch.no_grad():
        expected = program.run(call.start(program))
    found, peers, _ = run_program_in_tiles(program, call, tiles)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.std()))
    assert peers[0].num_posts == program.tile_traffic(call.rows).num_exchanges - len(skipped)


# files and names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prefix", "dtype"), [("", torch.float32), ("model.diffusion_model.", torch.float8_e4m3fn)], ids=["fp32", "fp8"])
def test_original_files_are_loaded(tmp_path: Path, kind: str, prefix: str, dtype: torch.dtype) -> None:
    tiny = KINDS[kind]
    found = check_loading(tiny, tmp_path, original_tensors(tiny.make(), prefix), dtype)
    assert (found.part.prefix, found.part.layout) == (prefix, Layout.LDM)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_files_are_loaded(tmp_path: Path, prefix: str) -> None:
    tensors = {prefix + key: tensor for key, tensor in make_sd3().state_dict().items()}
    assert check_loading(SD35, tmp_path, tensors, torch.float16).part == Part(prefix, Layout.DIFFUSERS)


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    tensors = original_tensors(make_sd3())
    library = make_sd3().state_dict()
    assert identify(SD35, tmp_path, {**library, "controlnet_blocks.0.weight": torch.zeros(2, 2)}) is None
    assert identify(SD35, tmp_path, {**library, "single_transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}) is None, "Flux.1"
    with pytest.raises(CheckpointError, match=r"model\.safetensors: looks like SD 3, but lacks y_embedder\.mlp\.0\.weight"):
        identify(SD35, tmp_path, {key: one for key, one in tensors.items() if key != "y_embedder.mlp.0.weight"})
    with pytest.raises(CheckpointError, match="143 positions"):
        identify(SD35, tmp_path, {**tensors, "pos_embed": torch.zeros(1, 143, WIDTH)})
    with pytest.raises(CheckpointError, match="4 latent channels"):
        identify(SD35, tmp_path, {**tensors, "x_embedder.proj.weight": torch.zeros(WIDTH, 4, 2, 2)})


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_map_writes_original_files_that_the_library_converts(kind: str) -> None:
    sd3 = KINDS[kind].make()
    made, wanted, own = sd3_key_map(sd3).to_original(sd3.state_dict()), original_tensors(sd3), sd3.state_dict()
    assert made.keys() == wanted.keys() and all(torch.equal(made[key], wanted[key]) for key in wanted)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(made))
    assert converted.keys() == own.keys() and all(torch.equal(converted[key], own[key]) for key in own)


@pytest.mark.parametrize("spelling", [*ORIGINAL_SPELLINGS, *LIBRARY_SPELLINGS])
def test_loras_of_every_spelling(spelling: str) -> None:
    check_lora_spelling(SD35, spelling)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters(kind: str) -> None:
    check_adapter(SD35, kind)


# the network


def make_rows() -> dict[str, Tensor]:
    inputs = make_inputs()
    return {"x": inputs["x"], "context": inputs["c_crossattn"], "y": inputs["y"], "timesteps": torch.tensor([900.0, 300.0])}


def reference(sd3: Any, rows: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return sd3(rows["x"], rows["context"], rows["y"], rows["timesteps"], return_dict=False, **more)[0]  # type: ignore[no-any-return]


def run(network: Any, rows: dict[str, Tensor], **options: Any) -> Tensor:
    program = build_sd3_program(network)
    with torch.no_grad():
        return program.run(program.start(rows, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fold_is_the_library_s_forward_bit_for_bit(kind: str) -> None:
    tiny, rows = KINDS[kind], make_rows()
    assert torch.equal(run(tiny.build(), rows), reference(tiny.make(), rows))


def test_layers_that_hooks_leave_out_are_the_library_s() -> None:
    rows = make_rows()
    assert torch.equal(run(SD35.build(), rows, options={"skip_layers": [1]}), reference(make_sd3(), rows, skip_layers=[1]))


def test_residuals_are_added_where_the_library_adds_them() -> None:
    rows = make_rows()
    residuals = [torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(number)) for number in range(3)]
    network = SD35.build()
    named = build_sd3_program(network).name_residuals({"output": residuals})
    assert set(named) == {Addition("output", 0, "image"), Addition("output", 1, "image")}, "nothing after the last block"
    torch.testing.assert_close(run(network, rows, residuals=named), reference(make_sd3(), rows, block_controlnet_hidden_states=residuals))


def test_hooks_may_replace_a_block() -> None:
    rows, seen = make_rows(), []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(sorted(args))
        return extra["original_block"](args)

    hooks = {"patches_replace": {"dit": {("double_block", 0): keep, ("double_block", 2): keep}}}
    assert torch.equal(run(SD35.build(), rows, options=hooks), run(SD35.build(), rows))
    assert seen == [["img", "transformer_options", "txt", "vec"]] * 2


def test_odd_sides_are_padded_and_what_is_too_large_is_said() -> None:
    rows = make_rows()
    assert run(SD35.build(), {**rows, "x": rows["x"][:, :, :7, :5]}).shape == (2, 16, 7, 5)
    with pytest.raises(ValueError, match=r"208x64 pixels, but this model knows positions up to 192 on each side"):
        run(SD35.build(), {**rows, "x": torch.zeros(2, 16, 8, 26)})
    with pytest.raises(ValueError, match=r"pooled text of CLIP-L and CLIP-G.*\(batch, 96\)"):
        run(SD35.build(), {name: tensor for name, tensor in rows.items() if name != "y"})


def test_in_fp16_streams_are_fp32_and_do_not_overflow() -> None:
    """A block adds 1.2e5 to the picture's stream. Reference: the library in fp32."""
    sd3 = make_sd3()
    block, rows = sd3.transformer_blocks[1], make_rows()
    block.norm1.linear.bias[5 * WIDTH :] = 6e4
    block.ff.net[2].bias.fill_(2.0)
    wanted = reference(sd3, rows)
    network = SD35.build()
    network.load_state_dict(sd3.state_dict())
    program = build_sd3_program(network.half())
    state = program.start({name: tensor if name == "timesteps" else tensor.half() for name, tensor in rows.items()})
    peak = 0.0
    with torch.no_grad():
        for segment in program.segments:
            segment(state)
            peak = max(peak, float(state.tensors["image"].abs().max()) if "image" in state.tensors else 0.0)
    assert peak > torch.finfo(torch.float16).max
    assert (state.tensors["flow"].float() - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize(("strategy", "count"), [("layers", 2), ("layers", 3), ("replicas", 2), ("tiles", 2)])
def test_several_slots_give_what_one_gives(strategy: str, count: int) -> None:
    check_slots(SD35, strategy, count)
