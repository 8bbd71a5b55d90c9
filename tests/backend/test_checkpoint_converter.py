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


@pytest.mark.parametrize("to", ["fp8_scaled", "int8", "nf4", "fp4", "q5_1"])
def test_every_format_is_read_back_within_its_rounding(flux: FluxFiles, tmp_path: Path, to: str) -> None:
    target = tmp_path / ("a.gguf" if to.startswith("q") else "a.safetensors")
    source, written = load_file(flux.checkpoint), read(convert(flux, target, to=to))
    limit = {"fp8_scaled": 0.05, "int8": 0.02, "nf4": 0.12, "fp4": 0.17, "q5_1": 0.05}[to]
    for key, tensor in source.items():
        assert torch.linalg.vector_norm(written[key] - tensor) <= limit * torch.linalg.vector_norm(tensor), key
    assert target.stat().st_size < 0.5 * flux.checkpoint.stat().st_size
    with open_tensor_file(target) as file:
        assert file.infos[LAYER].packed is not None


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
        ({"target": tmp_path / "a.gguf"}, r"without --to, the target is a \.safetensors"),
        ({"part": "lora"}, "--part 'lora' is unknown"),
        ({"sources": ()}, "No file was given"),
    ):
        with pytest.raises(ConversionError, match=words):
            convert(flux, **{"target": target, **job})
    with pytest.raises(ConversionError, match="has no vae part"):
        convert(flux, target, part="vae")
    low = convert(flux, tmp_path / "low.gguf", to="q8_0")
    with pytest.raises(ConversionError, match="stored in GGUF Q8_0, which cannot be copied as it is"):
        convert(flux, target, sources=(low,))
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(flux, target, sources=(tmp_path / "gone.safetensors",))
    assert not target.exists()
