"""Checkpoints, UNets and T5 encoders in low bits. Reference: the values that the format's own library reads, in a plain network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backend import memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.families.registry import identify
from backend.families.t5_text import build_t5, find_t5, plan_t5
from backend.loader import load_checkpoint
from backend.memory import dtype_policy
from backend.memory.module_bytes import count_module_bytes
from backend.parallel.planning import preview
from backend.state_dict import assign_tensors, check_plan, plan_denoiser
from backend.storage.four_bit import quantize_four_bit
from backend.storage.kinds import has_packed_weights, storage_of
from backend.storage.packed import PackedTensor
from backend.storage.running import set_types
from tests.support.checkpoints import write_checkpoint
from tests.support.fleets import virtual_fleet
from tests.support.flow_pictures import Prompts, cpu_engine, load, our_picture
from tests.support.flux_checkpoints import write_flux
from tests.support.flux_networks import make_flux, original_tensors
from tests.support.low_bits import SPELLINGS, quantize, write_gguf, write_low_bits
from tests.support.t5_encoders import t5_encoder, t5_state_dict

WIDE = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4}
"""A Flux whose rows are multiples of 32."""
WIDER = {**WIDE, "attention_head_dim": 64, "joint_attention_dim": 256, "axes_dims_rope": (8, 28, 28)}
"""Multiples of 256, but for the inputs of the first layers."""


def load_denoiser(path: Path) -> nn.Module:
    """The denoiser alone, with packed weights as the file has them."""
    with open_tensor_file(path) as file:
        identified = identify(file)
        assert identified is not None
        family, found = identified
        network = family.build_denoiser(found)
        plan = plan_denoiser(network, file, found.part, family.key_map(network).places)
        check_plan(plan, file, "transformer")
        assign_tensors(network, plan, file, storage_dtype=torch.float32, keeps_packed=True)
    set_types(network, torch.float32, torch.float32)
    return network


def run_flux(network: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    config = network.config
    tokens, text = torch.randn(1, 16, 64, generator=generator), torch.randn(1, 8, config["joint_attention_dim"], generator=generator)
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=generator)
    with torch.no_grad():
        (flow,) = network(tokens, text, pooled, torch.tensor([0.5]), torch.zeros(16, 3), torch.zeros(8, 3), torch.tensor([3.5]), return_dict=False)
    return flow  # type: ignore[no-any-return]


def share_packed(network: nn.Module) -> float:
    packed = sum(parameter.numel() for parameter in network.parameters() if isinstance(parameter, PackedTensor))
    return packed / sum(parameter.numel() for parameter in network.parameters())


def check_equal(network: nn.Module, path: Path, values: dict[str, Tensor]) -> None:
    """The packed network has the values, and gives the very bits of a plain network with them."""
    save_file({key: tensor.float().contiguous() for key, tensor in values.items()}, path)
    plain = load_denoiser(path)
    assert share_packed(network) > 0.9 and not has_packed_weights(plain)
    expected = plain.state_dict()
    for key, tensor in network.state_dict().items():
        assert torch.equal(storage_of(tensor).dequantize(torch.float32), expected[key].float()), key
    assert torch.equal(run_flux(network), run_flux(plain))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_spelling_gives_the_references_bits(spelling: str, prefix: str, tmp_path: Path) -> None:
    tensors = original_tensors(make_flux(**WIDE), prefix)
    values = write_low_bits(tmp_path / "low.safetensors", tensors, spelling, prefix)
    check_equal(load_denoiser(tmp_path / "low.safetensors"), tmp_path / "plain.safetensors", values)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0"])
def test_gguf_gives_the_packages_bits(kind: str, tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "low.gguf", original_tensors(make_flux(**WIDE)), kind)
    check_equal(load_denoiser(tmp_path / "low.gguf"), tmp_path / "plain.safetensors", values)


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_gguf_with_large_blocks_gives_the_packages_bits(kind: str, tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "low.gguf", original_tensors(make_flux(**WIDER)), kind)
    check_equal(load_denoiser(tmp_path / "low.gguf"), tmp_path / "plain.safetensors", values)


def test_a_mixed_file_packs_what_has_a_scale(tmp_path: Path) -> None:
    tensors = original_tensors(make_flux(**WIDE))
    low = quantize(tensors, "scaled_fp8")
    mixed = {key: tensor for key, tensor in low.tensors.items() if "double_blocks" in key or key == "scaled_fp8"}
    plain = {key: tensor for key, tensor in tensors.items() if "double_blocks" not in key}
    save_file({**mixed, **plain}, tmp_path / "mixed.safetensors")
    network: Any = load_denoiser(tmp_path / "mixed.safetensors")
    assert isinstance(network.transformer_blocks[0].attn.to_k.weight, PackedTensor)
    assert torch.equal(network.single_transformer_blocks[0].proj_out.weight, tensors["single_blocks.0.linear2.weight"])


@pytest.mark.parametrize("low", [*SPELLINGS, "gguf", "llama.cpp"])
def test_t5_encoders_are_read_by_every_name(low: str, tmp_path: Path) -> None:
    encoder = t5_encoder(width=64)
    tensors, path = t5_state_dict(encoder), tmp_path / "t5.gguf"
    if low in SPELLINGS:
        values = write_low_bits(path, tensors, low)
    elif low == "gguf":
        values = write_gguf(path, tensors, "Q8_0", architecture="t5encoder")
    else:
        values = dict(zip(tensors, write_gguf(path, _llama_cpp(tensors), "Q8_0", architecture="t5encoder").values(), strict=True))
    with open_tensor_file(path) as file:
        (part,) = find_t5(file.infos)
        network = build_t5(file, part)
        assign_tensors(network, plan_t5(network, file, part), file, storage_dtype=torch.float32, keeps_packed=True)
    set_types(network, torch.float32, torch.float32)
    reference = _plain_t5(values, tmp_path)
    tokens = torch.tensor([[5, 77, 3000, 1]])
    assert has_packed_weights(network)
    assert torch.equal(network(tokens).last_hidden_state, reference(tokens).last_hidden_state)


def _plain_t5(values: dict[str, Tensor], folder: Path) -> Any:
    save_file({key: tensor.float().contiguous() for key, tensor in values.items()}, folder / "t5.safetensors")
    with open_tensor_file(folder / "t5.safetensors") as file:
        (part,) = find_t5(file.infos)
        network = build_t5(file, part)
        assign_tensors(network, plan_t5(network, file, part), file, storage_dtype=torch.float32)
    return network


def _llama_cpp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that llama.cpp's converter gives them."""
    names = {
        "layer.0.SelfAttention.q": "attn_q", "layer.0.SelfAttention.k": "attn_k", "layer.0.SelfAttention.v": "attn_v",
        "layer.0.SelfAttention.o": "attn_o", "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.layer_norm": "attn_norm",
        "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up", "layer.1.DenseReluDense.wo": "ffn_down",
        "layer.1.layer_norm": "ffn_norm",
    }  # fmt: skip
    renamed = {}
    for key, tensor in tensors.items():
        head, _, rest = key.removeprefix("encoder.block.").partition(".")
        name = f"enc.blk.{head}.{names[rest.removesuffix('.weight')]}.weight" if key.startswith("encoder.block.") else key
        renamed[name.replace("shared", "token_embd").replace("encoder.final_layer_norm", "enc.output_norm")] = tensor
    return renamed


@pytest.mark.parametrize("low", ["scaled_fp8", "Q8_0"])
def test_a_whole_model_loads_and_runs_packed(low: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As users have it: a transformer in low bits, and T5 in low bits with it."""
    files = write_flux(tmp_path, **WIDE)
    tensors, t5 = original_tensors(files.flux), t5_state_dict(files.t5)
    if low == "Q8_0":
        checkpoint, encoder = tmp_path / "flux.gguf", tmp_path / "t5xxl.gguf"
        values, text_values = write_gguf(checkpoint, tensors, low), write_gguf(encoder, t5, low, architecture="t5encoder")
    else:
        checkpoint, encoder = tmp_path / "low.safetensors", tmp_path / "t5low.safetensors"
        values, text_values = write_low_bits(checkpoint, tensors, low), write_low_bits(encoder, t5, low)
    save_file({key: tensor.contiguous() for key, tensor in values.items()}, tmp_path / "plain.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in text_values.items()}, tmp_path / "t5plain.safetensors")
    with virtual_fleet(1):
        caplog.set_level("INFO", logger="backend.loader")
        results = []
        for main, text in ((checkpoint, encoder), (tmp_path / "plain.safetensors", tmp_path / "t5plain.safetensors")):
            engine = load_checkpoint(main, config=BackendConfig(), additional_modules=[*files.modules[:2], text])
            memory_management.load_models_gpu([engine.forge_objects.unet])
            conditions = {name: tensor.cpu() for name, tensor in engine.get_learned_conditioning(["a red cube"]).items()}
            unet = engine.forge_objects.unet
            x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
            inputs = {
                "x": x,
                "t": torch.tensor([0.5]),
                "c_crossattn": conditions["crossattn"],
                "y": conditions["vector"],
                "guidance": torch.tensor([3.5]),
            }
            on_slot = {name: tensor.to(unet.load_device) for name, tensor in inputs.items()}
            results.append((conditions, unet.model.apply_model(**on_slot).cpu()))
            memory_management.unload_all_models()
    (packed_text, packed), (plain_text, plain) = results
    assert all(torch.equal(packed_text[name], plain_text[name]) for name in plain_text) and torch.equal(packed, plain)
    assert f"transformer stored in {'GGUF Q8_0' if low == 'Q8_0' else 'fp8 e4m3 scaled'}" in caplog.text


@pytest.mark.parametrize("low", ["scaled_fp8", "nf4", "Q8_0"])
def test_pictures_are_those_of_the_dequantized_checkpoint(low: str, tmp_path: Path) -> None:
    files, plain = write_flux(tmp_path, **WIDE), tmp_path / "plain.safetensors"
    path, tensors = tmp_path / ("low.gguf" if low == "Q8_0" else "low.safetensors"), original_tensors(files.flux)
    values = write_gguf(path, tensors, low) if low == "Q8_0" else write_low_bits(path, tensors, low)
    save_file({key: tensor.float().contiguous() for key, tensor in values.items()}, plain)
    pictures = []
    with cpu_engine():
        for checkpoint in (path, plain, files.checkpoint):
            engine = load(checkpoint, files.modules)
            text = engine.get_learned_conditioning(Prompts(["a red cube"]))
            start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
            pictures.append(our_picture(engine, "Euler", torch.tensor([1.0, 0.6, 0.0]), start, text))
            memory_management.unload_all_models()
    low_bits, dequantized, full = pictures
    assert torch.equal(low_bits, dequantized) and not torch.equal(low_bits, full) and low_bits.std() > 0.01


@pytest.mark.parametrize("spelling", ["scaled_fp8", "comfy"])
def test_fp8_values_that_are_no_numbers_are_refused(spelling: str, tmp_path: Path) -> None:
    low = quantize({"a.weight": torch.randn(4, 64)}, "scaled_fp8").tensors if spelling == "scaled_fp8" else _kitchen()
    key = "a.weight" if spelling == "scaled_fp8" else "mxfp8.weight"
    low[key].view(torch.uint8)[1, 3] = 0xFF
    save_file(low, tmp_path / "nan.safetensors")
    with open_tensor_file(tmp_path / "nan.safetensors") as file, pytest.raises(CheckpointError, match="has values that are not numbers"):
        file.read_stored(key)


def test_the_plan_before_loading_counts_packed_bytes(tmp_path: Path) -> None:
    path = tmp_path / "low.gguf"
    write_gguf(path, original_tensors(make_flux(**WIDE)), "Q8_0")
    with open_tensor_file(path) as file:
        identified = identify(file)
        assert identified is not None
        profile = preview._profile(file, *identified, 8)
    network = load_denoiser(path)
    assert profile.weight_bytes == count_module_bytes(network).total_bytes
    assert count_module_bytes(network).total_bytes < 0.35 * 4 * sum(parameter.numel() for parameter in network.parameters())


def test_a_plain_file_is_quantized_as_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What "Diffusion in Low Bits" asks for; a file that is in low bits already stays as it is, and the log says so."""
    files, low = write_flux(tmp_path, **WIDE), tmp_path / "low.gguf"
    write_gguf(low, original_tensors(files.flux), "Q8_0")
    caplog.set_level("INFO", logger="backend.loader")
    engine = load_checkpoint(files.checkpoint, config=BackendConfig(), additional_modules=files.modules, unet_format="nf4")
    layer = engine.forge_objects.unet.model.diffusion_model.transformer_blocks[0].attn.to_k
    assert storage_of(layer.weight).is_same(storage_of(quantize_four_bit(files.flux.transformer_blocks[0].attn.to_k.weight, "nf4")))
    assert "transformer stored in NF4" in caplog.text
    engine = load_checkpoint(low, config=BackendConfig(), additional_modules=files.modules, unet_format="nf4")
    assert storage_of(engine.forge_objects.unet.model.diffusion_model.proj_out.weight).title == "GGUF Q8_0"
    note = "Diffusion in Low Bits: low.gguf is in low bits already; the weights are stored in GGUF Q8_0, not in nf4."
    assert note in caplog.text and engine.storage_notes == (note,)


def test_a_type_that_the_device_cannot_store_is_said_and_the_usual_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_flux(tmp_path, **WIDE)
    monkeypatch.setattr(memory_management, "supports_cast", lambda device, dtype: dtype != torch.float8_e5m2)
    engine = load_checkpoint(
        files.checkpoint, config=BackendConfig(), additional_modules=files.modules, unet_storage_dtype=torch.float8_e5m2
    )  # fmt: skip
    assert engine.forge_objects.unet.model.storage_dtype == torch.float32
    (note,) = engine.storage_notes
    assert "cannot store weights in float8_e5m2; the weights are stored in float32, not in float8_e5m2." in note and note in caplog.text


def test_fp8_products_need_every_slot_and_it_is_said_where_they_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, config = write_flux(tmp_path, **WIDE), BackendConfig(fast_fp8=True)
    with virtual_fleet(2, fast_fp8=True):
        engine = load_checkpoint(files.checkpoint, config=config, additional_modules=files.modules, unet_format="fp8_scaled")
        (note,) = engine.storage_notes
        assert note.startswith("--fast-fp8: not every GPU in use multiplies fp8 numbers") and not engine.forge_objects.unet.model.multiplies_fp8
        monkeypatch.setattr(dtype_policy, "multiplies_fp8", lambda facts: True)
        engine = load_checkpoint(files.checkpoint, config=config, additional_modules=files.modules, unet_format="fp8_scaled")
        assert engine.storage_notes == () and engine.forge_objects.unet.model.multiplies_fp8
        cards = iter([True, False])
        monkeypatch.setattr(dtype_policy, "multiplies_fp8", lambda facts: next(cards))
        assert not memory_management.multiplies_fp8()


def test_a_model_in_low_bits_is_saved_in_half_precision(tmp_path: Path) -> None:
    files = write_flux(tmp_path, **WIDE)
    write_gguf(tmp_path / "low.gguf", original_tensors(files.flux), "Q8_0")
    engine = load_checkpoint(tmp_path / "low.gguf", config=BackendConfig(), additional_modules=files.modules)
    for save, name in ((engine.save_unet, "unet"), (engine.save_checkpoint, "whole")):
        save(tmp_path / f"{name}.safetensors")
        saved = load_denoiser(tmp_path / f"{name}.safetensors").state_dict()
        for key, tensor in engine.forge_objects.unet.model.diffusion_model.state_dict().items():
            half = storage_of(tensor).dequantize(torch.float16).float() if isinstance(tensor, PackedTensor) else tensor
            assert torch.equal(saved[key], half), key


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_in_gguf_has_its_kernels_back(family: str, tmp_path: Path) -> None:
    """As ComfyUI-GGUF's converter writes them: kernels whose rows blocks do not divide are matrices, with their shapes in the metadata."""
    source = write_checkpoint(tmp_path / "whole.safetensors", family)
    prefix = "model.diffusion_model."
    with open_tensor_file(source.path) as file:
        tensors = {key.removeprefix(prefix): file.read(key, dtype=torch.float32) for key in file.infos if key.startswith(prefix)}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if tensor.ndim == 4 and tensor.numel() % 256 == 0}
    flat = {key: tensor.reshape(-1, 256) if key in shapes else tensor for key, tensor in tensors.items()}
    values = write_gguf(tmp_path / "unet.gguf", flat, "Q8_0", architecture=family, shapes=shapes)
    save_file({f"{prefix}{key}": tensor.contiguous() for key, tensor in values.items()}, tmp_path / "plain.safetensors")
    network, plain = load_denoiser(tmp_path / "unet.gguf"), load_denoiser(tmp_path / "plain.safetensors").state_dict()
    assert share_packed(network) > 0.8
    for key, tensor in network.state_dict().items():
        assert torch.equal(storage_of(tensor).dequantize(torch.float32), plain[key].float()), key


# files that lie


def test_files_for_other_programs_kernels_are_named(tmp_path: Path) -> None:
    tensors = original_tensors(make_flux(**WIDE))
    layer = "double_blocks.0.img_mlp.0"
    for extra, words in (
        ({f"{layer}.qweight": torch.zeros(4, dtype=torch.int8)}, "SVDQuant"),
        ({f"{layer}.comfy_quant": _text('{"format": "asym_w4a8_int8"}')}, "stored as asym_w4a8_int8, which cannot be read; .*, mxfp8, nvfp4 can"),
        ({f"{layer}.comfy_quant": _text('{"format": "convrot_w4a4", "convrot": true}')}, r"convrot_w4a4 with rotation \(convrot\)"),
        ({f"{layer}.comfy_quant": _text('{"format": "nvfp4"}')}, r"stored as nvfp4 but has no .*\.weight_scale"),
        ({f"{layer}.comfy_quant": _text("{")}, "cannot be read"),
        ({f"{layer}.comfy_quant": _text("[]")}, "is no description"),
        ({"nowhere.scale_weight": torch.ones(())}, "but no nowhere.weight"),
        ({f"{layer}.scale_weight": torch.ones(())}, "has a scale .* but is stored as float32"),
    ):
        save_file({**tensors, **extra}, tmp_path / "odd.safetensors")
        with pytest.raises(CheckpointError, match=words), open_tensor_file(tmp_path / "odd.safetensors"):
            pass


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [2**40, 2**40]}, r"a\.weight is .* numbers of 1 bytes are needed"),
        ({"shape": [-1, 64]}, "its shape is"),
        ({"shape": "x"}, "its shape is"),
        ({"blocksize": 0}, "its block sizes are 0"),
        ({"blocksize": 2**60}, "its block sizes are"),
        ({"nested_blocksize": 256, "nested_offset": float("nan")}, "its offset is"),
        ({"nested_blocksize": 256, "nested_offset": 0.1}, r"is missing|is \("),
    ],
)
def test_descriptions_of_four_bits_that_lie_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    low = quantize({"a.weight": torch.randn(4, 64)}, "nf4").tensors
    state = json.loads(bytes(low["a.weight.quant_state.bitsandbytes__nf4"].tolist()))
    low["a.weight.quant_state.bitsandbytes__nf4"] = _text(json.dumps({**state, **change}))
    save_file(low, tmp_path / "lies.safetensors")
    with pytest.raises(CheckpointError, match=words), open_tensor_file(tmp_path / "lies.safetensors"):
        pass


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(number: float, tmp_path: Path) -> None:
    low = quantize({"a.weight": torch.randn(4, 64)}, "scaled_fp8").tensors
    save_file({**low, "a.scale_weight": torch.tensor(number)}, tmp_path / "nan.safetensors")
    with open_tensor_file(tmp_path / "nan.safetensors") as file, pytest.raises(CheckpointError, match=r"a\.scale_weight is not a number"):
        file.read_stored("a.weight")


# comfy-kitchen's own bytes


KITCHEN = Path(__file__).parent / "data" / "comfy_kitchen_0_2_40.safetensors"


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int8_row", "int8_tensor", "convrot", "convrot64"])
def test_bytes_of_comfy_kitchen_have_its_values(name: str) -> None:
    """Written by comfy-kitchen 0.2.40 on the CPU (`QuantizedTensor.from_float`, `state_dict_tensors`), with what its `dequantize` returned.

    Bit for bit, but for the sums of a rotation, which have another order.
    """
    with open_tensor_file(KITCHEN) as file:
        expected, source = file.read(f"{name}.expected"), file.read("block.source" if name in ("mxfp8", "nvfp4") else "rows.source")
        found = storage_of(file.read_stored(f"{name}.weight"))
        value = found.dequantize(torch.float32)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6 if "convrot" in name else 0)
        for first, end in ((0, 4), (len(value) - 7, len(value))):
            torch.testing.assert_close(file.read(f"{name}.weight", rows=(first, end)), value[first:end], rtol=0, atol=1e-7)
        ours = (
            found.requantize(source, seed=0) if "int8" not in name else storage_of(PackedTensor(found.format.quantize(source, seed=0), found.format))
        )  # type: ignore[attr-defined]
        same = (ours.dequantize(torch.float32) - expected).abs() < 1e-6
        assert same.float().mean() > (0.999 if "convrot" in name else 0.99999)


def _kitchen() -> dict[str, Tensor]:
    return load_file(KITCHEN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mxfp8.weight_scale": torch.zeros(128, 8, dtype=torch.uint8)}, "mxfp8 needs 256x8 scales of one byte there"),
        ({"mxfp8.weight": torch.zeros(160, 159, dtype=torch.uint8)}, "mxfp8 needs a matrix of float8_e4m3fn"),
        ({"nvfp4.weight_scale_2": None}, r"nvfp4\.weight_scale_2 is missing; nvfp4 needs one number there"),
        ({"nvfp4.weight_scale_2": torch.ones(3)}, "nvfp4 needs one number there"),
        ({"nvfp4.weight": None}, r"nvfp4\.weight is missing"),
        ({"nvfp4.weight_scale": None}, r"stored as nvfp4 but has no nvfp4\.weight_scale"),
        ({"convrot.comfy_quant": b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 96}'}, "groups of 96 numbers are rotated"),
        ({"convrot.comfy_quant": b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 4e99}'}, "numbers are rotated"),
        ({"convrot.comfy_quant": b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 1024}'}, "a power of 4 that divides its rows"),
    ],
)
def test_descriptions_of_comfy_kitchen_that_lie_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {**_kitchen(), **change}
    made = {key: _text(value.decode()) if isinstance(value, bytes) else value for key, value in tensors.items() if value is not None}
    save_file(made, tmp_path / "lies.safetensors")
    with pytest.raises(CheckpointError, match=words), open_tensor_file(tmp_path / "lies.safetensors"):
        pass


@pytest.mark.parametrize(("name", "byte"), [("mxfp8", 0xFF), ("nvfp4", 0x7F)])
def test_scales_of_blocks_that_are_no_numbers_are_refused(name: str, byte: int, tmp_path: Path) -> None:
    tensors = _kitchen()
    tensors[f"{name}.weight_scale"] = torch.full(tensors[f"{name}.weight_scale"].shape, byte, dtype=torch.uint8)
    save_file(tensors, tmp_path / "nan.safetensors")
    with (
        open_tensor_file(tmp_path / "nan.safetensors") as file,
        pytest.raises(CheckpointError, match=rf"the scales of {name}\.weight are not numbers"),
    ):
        file.read_stored(f"{name}.weight")


def test_a_layer_named_in_the_metadata_may_lack_the_denoisers_prefix(tmp_path: Path) -> None:
    """ComfyUI takes the prefix off before it reads `_quantization_metadata`."""
    prefix, tensors = "model.diffusion_model.", _kitchen()
    made = {f"{prefix}a{key.removeprefix('nvfp4')}": tensor for key, tensor in tensors.items() if key.startswith("nvfp4.weight")}
    save_file(made, tmp_path / "a.safetensors", {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "nvfp4"}}})})
    with open_tensor_file(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read(f"{prefix}a.weight"), tensors["nvfp4.expected"])


# bitsandbytes' own bytes


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4_nested", "fp4_nested"])
def test_bytes_of_bitsandbytes_have_its_values_bit_for_bit(name: str) -> None:
    """Written by bitsandbytes 0.50.2 on the CPU (`quantize_4bit`, `as_dict(packed=True)`), with what its `dequantize_4bit` returned."""
    with open_tensor_file(Path(__file__).parent / "data" / "bitsandbytes_0_50_2.safetensors") as file:
        expected = file.read(f"{name}.expected")
        assert torch.equal(storage_of(file.read_stored(f"{name}.weight")).dequantize(torch.float32), expected)
        assert torch.equal(storage_of(file.read_stored(f"{name}.weight", rows=(1, 3))).dequantize(torch.float32), expected[1:3])
        assert torch.equal(file.read(f"{name}.weight", rows=(2, 4)), expected[2:4])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_those_that_bitsandbytes_writes(kind: str) -> None:
    """Written by bitsandbytes 0.50.2 on the CPU (`quantize_4bit`)."""
    codes = load_file(Path(__file__).parent / "data" / "bitsandbytes_0_50_2_codes.safetensors")
    packed = quantize_four_bit(codes["source"].float(), kind)
    found_absmax, found_codes = packed.format.parts(packed.buffer)  # type: ignore[attr-defined]
    assert torch.equal(found_absmax, codes[f"{kind}.absmax"]) and torch.equal(found_codes, codes[f"{kind}.codes"])
