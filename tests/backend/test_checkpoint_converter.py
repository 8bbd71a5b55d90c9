"""Converted files: types, parts, LoRA, and that a target is whole or absent. References: torch's casts, the `gguf` package, the loaded network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend import checkpoint_converter
from backend.args import BackendConfig
from backend.checkpoint_converter import Conversion, ConversionError, conversion_types, convert_checkpoint
from backend.checkpoint_file import CheckpointError, open_tensor_file
from backend.loader import load_checkpoint
from backend.patcher.lora_files import match_lora, read_lora_file
from backend.storage.kinds import storage_of
from tests.support.checkpoints import write_checkpoint
from tests.support.flux_checkpoints import FluxFiles, write_flux
from tests.support.flux_networks import original_tensors

WIDE = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 4}
LAYER = "double_blocks.0.img_attn.qkv.weight"
WIDE_LAYER = "double_blocks.0.img_mlp.2.weight"
"""Rows of 256."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> FluxFiles:
    return write_flux(tmp_path_factory.mktemp("flux"), **WIDE)


def convert(flux: FluxFiles, target: Path, **job: Any) -> Path:
    convert_checkpoint(Conversion(**{"sources": (flux.checkpoint,), "target": target, **job}))
    return target


def read(path: Path) -> dict[str, Tensor]:
    with open_tensor_file(path) as file:
        return {key: file.read(key, dtype=torch.float32) for key in file.infos}


@pytest.mark.parametrize(("to", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)])
def test_plain_types_are_torchs_casts(flux: FluxFiles, tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    written, source = load_file(convert(flux, tmp_path / "a.safetensors", to=to)), load_file(flux.checkpoint)
    assert set(written) == set(source)
    for key, tensor in source.items():
        wanted = torch.float16 if to == "fp8" and tensor.ndim < 2 else dtype
        assert written[key].dtype == wanted and torch.equal(written[key].float(), tensor.to(wanted).float())


@pytest.mark.parametrize("to", ["q8_0", "q4_0"])
def test_gguf_files_are_what_the_package_writes(flux: FluxFiles, tmp_path: Path, to: str) -> None:
    source, number = load_file(flux.checkpoint), gguf.GGMLQuantizationType[to.upper()]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(convert(flux, tmp_path / "a.gguf", to=to)).tensors}
    assert set(tensors) == set(source)
    assert (gguf.quants.quantize(source[LAYER].numpy(), number) == tensors[LAYER].data).all()
    bias = tensors["double_blocks.0.img_attn.qkv.bias"]
    assert bias.tensor_type == gguf.GGMLQuantizationType.F32 and (bias.data == source[bias.name].numpy()).all()


@pytest.mark.parametrize("to", ["fp8_scaled", "int8", "int8_convrot", "mxfp8", "nvfp4", "nf4", "fp4", "q5_1"])
def test_every_format_is_read_back_within_its_rounding(flux: FluxFiles, tmp_path: Path, to: str) -> None:
    target = tmp_path / ("a.gguf" if to.startswith("q") else "a.safetensors")
    source, written = load_file(flux.checkpoint), read(convert(flux, target, to=to))
    limits = {"fp8_scaled": 0.05, "int8": 0.02, "int8_convrot": 0.02, "mxfp8": 0.05, "nvfp4": 0.14, "nf4": 0.12, "fp4": 0.17, "q5_1": 0.05}
    limit = limits[to]
    for key, tensor in source.items():
        assert torch.linalg.vector_norm(written[key] - tensor) <= limit * torch.linalg.vector_norm(tensor), key
    assert target.stat().st_size < 0.5 * flux.checkpoint.stat().st_size
    with open_tensor_file(target) as file:
        assert file.infos[WIDE_LAYER if to == "int8_convrot" else LAYER].packed is not None


def test_parts_are_put_together_and_taken_out_again(flux: FluxFiles, tmp_path: Path) -> None:
    whole = convert(flux, tmp_path / "whole.safetensors", sources=(flux.checkpoint, *flux.modules))
    engine = load_checkpoint(whole, config=BackendConfig())
    assert torch.equal(engine.forge_objects.unet.model.diffusion_model.proj_out.weight, flux.flux.proj_out.weight)
    assert torch.equal(engine.forge_objects.vae.first_stage_model.decoder.conv_in.weight, flux.vae.decoder.conv_in.weight)
    for part, source in (("denoiser", flux.checkpoint), ("vae", flux.modules[0])):
        taken = load_file(convert(flux, tmp_path / f"{part}.safetensors", sources=(whole,), part=part))
        wanted = load_file(source)
        assert set(taken) == set(wanted) and all(torch.equal(taken[key], wanted[key]) for key in wanted)


def test_a_unet_checkpoint_keeps_its_names_and_its_vae_plain(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path / "sd.safetensors", "sd15")
    convert_checkpoint(Conversion(sources=(reference.path,), target=tmp_path / "low.safetensors", to="fp8_scaled"))
    with open_tensor_file(tmp_path / "low.safetensors") as file:
        assert set(load_file(reference.path)) == set(file.infos)
        assert all(info.packed is None for key, info in file.infos.items() if key.startswith("first_stage_model."))
        assert any(info.packed is not None for key, info in file.infos.items() if key.startswith("model.diffusion_model."))


def test_a_merged_lora_gives_the_weights_of_the_loaded_network(flux: FluxFiles, tmp_path: Path) -> None:
    generator, file = torch.Generator().manual_seed(1), {}
    for key, tensor in original_tensors(flux.flux).items():
        if tensor.ndim == 2:
            name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            file[f"{name}.lora_up.weight"] = torch.randn(tensor.shape[0], 2, generator=generator) * 0.1
            file[f"{name}.lora_down.weight"] = torch.randn(2, tensor.shape[1], generator=generator) * 0.1
    save_file(file, tmp_path / "style.safetensors")
    merged = convert(flux, tmp_path / "merged.safetensors", loras=((tmp_path / "style.safetensors", 0.7),))
    engine = load_checkpoint(flux.checkpoint, config=BackendConfig(), additional_modules=flux.modules)
    unet = engine.forge_objects.unet
    patches = match_lora(read_lora_file(tmp_path / "style.safetensors"), unet, None, model_family="Flux.1")
    unet.add_patches(filename="style", patches=dict(patches.unet), strength_patch=0.7)
    unet.refresh_loras()
    other = load_checkpoint(merged, config=BackendConfig(), additional_modules=flux.modules).forge_objects.unet.model
    for key, tensor in unet.model.diffusion_model.state_dict().items():
        torch.testing.assert_close(storage_of(other.diffusion_model.state_dict()[key]).dequantize(torch.float32), tensor, atol=1e-6, rtol=1e-6)
    assert not torch.equal(other.diffusion_model.proj_out.weight, flux.flux.proj_out.weight)


def test_a_lora_is_merged_into_text_encoders_too(tmp_path: Path) -> None:
    """SDXL, whose second encoder has one matrix for queries, keys and values. Reference: the loaded networks with the LoRA."""
    source = write_checkpoint(tmp_path / "xl.safetensors", "sdxl").path
    save_file(_text_lora(source), tmp_path / "style.safetensors")
    merged = tmp_path / "merged.safetensors"
    convert_checkpoint(Conversion(sources=(source,), target=merged, loras=((tmp_path / "style.safetensors", 0.7),)))
    engine, other = load_checkpoint(source, config=BackendConfig()), load_checkpoint(merged, config=BackendConfig())
    before = {key: tensor.clone() for key, tensor in engine.forge_objects.clip.cond_stage_model.state_dict().items()}
    objects = engine.forge_objects
    patches = match_lora(read_lora_file(tmp_path / "style.safetensors"), objects.unet, objects.clip, model_family="SDXL")
    assert len(patches.clip) > 8
    objects.clip.add_patches(filename="style", patches=dict(patches.clip), strength_patch=0.7)
    objects.clip.patcher.refresh_loras()
    found, wanted = other.forge_objects.clip.cond_stage_model.state_dict(), objects.clip.cond_stage_model.state_dict()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key].float(), tensor.float(), atol=2e-3, rtol=2e-3)
    changed = {key.partition(".")[0] for key, tensor in wanted.items() if not torch.equal(before[key], tensor)}
    assert changed == {"clip_l", "clip_g"}


def _text_lora(checkpoint: Path) -> dict[str, Tensor]:
    """For queries and feed-forward layers of both text encoders, as kohya names them."""
    generator, file = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        encoders = load_checkpoint(checkpoint, config=BackendConfig()).forge_objects.clip.cond_stage_model
    for number, encoder in enumerate(encoders.values(), start=1):
        for name, module in encoder.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(("q_proj", "v_proj", "fc1")):
                layer = f"lora_te{number}_{'' if name.startswith('text_model.') else 'text_model.'}{name}".replace(".", "_")
                file[f"{layer}.lora_up.weight"] = torch.randn(module.out_features, 2, generator=generator) * 0.1
                file[f"{layer}.lora_down.weight"] = torch.randn(2, module.in_features, generator=generator) * 0.1
    return file


@pytest.mark.parametrize("low", ["fp8_scaled", "int8_convrot", "nf4", "mxfp8", "nvfp4", "q5_0"])
def test_packed_weights_are_copied_byte_for_byte(flux: FluxFiles, tmp_path: Path, low: str) -> None:
    suffix = ".gguf" if low.startswith("q") else ".safetensors"
    source = convert(flux, tmp_path / f"low{suffix}", to=low)
    copied = convert(flux, tmp_path / f"copied{suffix}", sources=(source,), part="denoiser")
    with open_tensor_file(source) as one, open_tensor_file(copied) as other:
        assert one.infos == other.infos and any(info.packed is not None for info in one.infos.values())
        for key in one.infos:
            assert storage_of(one.read_stored(key)).is_same(storage_of(other.read_stored(key))), key


def test_double_quantization_is_copied_too(tmp_path: Path) -> None:
    """bitsandbytes' own file."""
    source = Path(__file__).parent / "data" / "bitsandbytes_0_50_2.safetensors"
    convert_checkpoint(Conversion(sources=(source,), target=tmp_path / "copied.safetensors"))
    with open_tensor_file(source) as one, open_tensor_file(tmp_path / "copied.safetensors") as other:
        assert one.infos == other.infos
        for key in ("nf4_nested.weight", "fp4_nested.weight", "nf4.weight"):
            assert storage_of(one.read_stored(key)).is_same(storage_of(other.read_stored(key))), key


def test_a_copy_with_a_lora_quantizes_only_what_it_changes(flux: FluxFiles, tmp_path: Path) -> None:
    low = convert(flux, tmp_path / "low.safetensors", to="fp8_scaled")
    generator, (rows, columns) = torch.Generator().manual_seed(1), original_tensors(flux.flux)[WIDE_LAYER].shape
    layer = f"lora_unet_{WIDE_LAYER.removesuffix('.weight').replace('.', '_')}"
    up, down = torch.randn(rows, 2, generator=generator) * 0.1, torch.randn(2, columns, generator=generator) * 0.1
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, tmp_path / "style.safetensors")
    merged = convert(flux, tmp_path / "merged.safetensors", sources=(low,), loras=((tmp_path / "style.safetensors", 1.0),))
    with open_tensor_file(low) as one, open_tensor_file(merged) as other:
        differing = [key for key in one.infos if not storage_of(one.read_stored(key)).is_same(storage_of(other.read_stored(key)))]
        assert differing == [WIDE_LAYER]
        wanted = one.read(WIDE_LAYER) + up @ down
        assert torch.linalg.vector_norm(other.read(WIDE_LAYER) - wanted) < 0.05 * torch.linalg.vector_norm(wanted)


def test_a_gguf_file_of_a_whole_checkpoint_keeps_the_parts_apart(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "sd.safetensors", "sd15").path
    convert_checkpoint(Conversion(sources=(source,), target=tmp_path / "sd.gguf", to="q8_0"))
    with open_tensor_file(source) as one, open_tensor_file(tmp_path / "sd.gguf") as other:
        assert {key for key, info in one.infos.items() if info.dtype.is_floating_point} <= set(other.infos)
    assert load_checkpoint(tmp_path / "sd.gguf", config=BackendConfig()).family == "sd15"


def test_progress_reaches_all_and_a_failure_leaves_nothing(flux: FluxFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    job = Conversion(sources=(flux.checkpoint,), target=tmp_path / "a.safetensors", to="fp8_scaled")
    total = convert_checkpoint(job, lambda done, all_bytes: seen.append((done, all_bytes)))
    assert seen[-1] == (total, total) and seen == sorted(seen)
    with pytest.raises(ConversionError, match="exists already"):
        convert_checkpoint(job)

    def fail(done: int, total: int) -> None:
        raise OSError("disk full")

    for name in ("b.safetensors", "b.gguf"):
        with pytest.raises(OSError, match="disk full"):
            convert_checkpoint(Conversion(sources=(flux.checkpoint,), target=tmp_path / name, to="q8_0" if "gguf" in name else "fp16"), fail)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors"}
    monkeypatch.setattr(checkpoint_converter.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(ConversionError, match=r"needs .* GB free\. Make room"):
        convert(flux, tmp_path / "c.safetensors", to="fp16")


def test_what_is_not_possible_is_said(flux: FluxFiles, tmp_path: Path) -> None:
    assert "q8_0" in conversion_types() and "q4_k" not in conversion_types()
    target = tmp_path / "a.safetensors"
    for job, words in (
        ({"to": "q4_k"}, "has no quantizer"),
        ({"to": "q8_0"}, r"q8_0 is written to a \.gguf file"),
        ({"target": tmp_path / "a.txt"}, r"the target is a \.safetensors or a \.gguf file"),
        ({"part": "lora"}, "--part 'lora' is unknown"),
        ({"sources": ()}, "No file was given"),
    ):
        with pytest.raises(ConversionError, match=words):
            convert(flux, **{"target": target, **job})
    with pytest.raises(ConversionError, match="has no vae part"):
        convert(flux, target, part="vae")
    low = convert(flux, tmp_path / "low.gguf", to="q8_0")
    with pytest.raises(ConversionError, match=r"stored in GGUF Q8_0, which a \.safetensors file cannot have"):
        convert(flux, target, sources=(low,))
    nf4 = convert(flux, tmp_path / "nf4.safetensors", to="nf4")
    with pytest.raises(ConversionError, match=r"stored in NF4, which a \.gguf file cannot have"):
        convert(flux, tmp_path / "b.gguf", sources=(nf4,))
    save_file({"a.weight": torch.ones(4, 4, dtype=torch.uint8)}, tmp_path / "bytes.safetensors")
    with pytest.raises(ConversionError, match="stored as uint8, which a GGUF file does not have"):
        convert(flux, tmp_path / "b.gguf", sources=(tmp_path / "bytes.safetensors",), to="q8_0")
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(flux, target, sources=(tmp_path / "gone.safetensors",))
    assert not target.exists()
