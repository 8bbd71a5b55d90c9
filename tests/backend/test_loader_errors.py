"""Unusable files: each gets a message that says what it is and what to do. Nothing in a pickle runs, no file is changed."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend import key_layout, memory_management
from backend.args import BackendConfig
from backend.checkpoint_file import open_tensor_file, read_metadata
from backend.checkpoint_pickle import UnsafePickleError, load_tensors
from backend.devices.probing import probe_devices
from backend.loader import CheckpointError, load_checkpoint
from tests.support.checkpoints import write_checkpoint

CONFIG = BackendConfig()


@pytest.fixture(autouse=True)
def _cpu_engine():
    memory_management.configure(CONFIG, probe_devices(BackendConfig(device_ids=("cpu",))))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good") / "good.safetensors", "sd15").path


@pytest.fixture(scope="module")
def good_xl(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good") / "good_xl.safetensors", "sdxl").path


def _refusal(path: Path, **kwargs) -> str:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, config=CONFIG, **kwargs)
    assert before is None or path.read_bytes() == before
    message = str(caught.value)
    assert message.startswith(path.name) or kwargs
    assert "Traceback" not in message and message.endswith((".", ")"))
    return message


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


RAW_FILES = {
    "empty": (b"", "is empty (0 bytes); the download did not finish"),
    "html": (b"<!DOCTYPE html><html>Log in</html>", "is a text or web page, not a model"),
    "text": (b"Access to this model is restricted.\n", "is a text or web page"),
    "json": (b'{"error": "not found"}' + b" " * 40, "is a text or web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4265380512\n", "is a Git LFS pointer"),
    "gguf without tensors": (b"GGUF\x03\0\0\0" + b"\0" * 64, "has no tensors"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "is a PNG picture"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + b"\0" * 64, "Unpack it"),
    "noise": (bytes(range(200, 256)) * 4, "is neither a .safetensors file nor a PyTorch"),
    "header promises more": ((10_000).to_bytes(8, "little") + b"{" + b" " * 100, "is cut short inside its header"),
    "header is no json": ((20).to_bytes(8, "little") + b"{nonsense}..........", "its header cannot be read"),
    "header without tensors": ((2).to_bytes(8, "little") + b"{}" + b"\0" * 8, "has no tensors"),
    "zip of nothing": (b"PK\x03\x04" + b"\0" * 200, "cannot be read as a PyTorch file"),
    "pickle of nothing": (b"\x80\x02" + b"\xff" * 50, "damaged or cut short"),
}


@pytest.mark.parametrize("kind", RAW_FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_that_are_not_models(kind, suffix, tmp_path):
    content, words = RAW_FILES[kind]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert words in _refusal(path)


def test_missing_file_and_folder(tmp_path):
    assert "cannot be read from" in _refusal(tmp_path / "gone.safetensors")
    assert "this is a folder" in _refusal(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated_safetensors(share, good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(len(content) * share)])
    message = _refusal(path)
    assert "is cut short" in message and "Download it again" in message


def test_truncated_pickle(tmp_path):
    path = write_checkpoint(tmp_path / "m.ckpt", "sd15").path
    path.write_bytes(path.read_bytes()[:-100_000])
    assert "damaged or cut short" in _refusal(path)


def _write_header(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "does not match its shape"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": ["a", "b"]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "entry for a is damaged"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": [10**30], "data_offsets": [0, 8]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": [2**60, 2**60], "data_offsets": [0, 8]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": [1] * 70 + [2], "data_offsets": [0, 8]}, "entry for a is damaged"),
        ({"dtype": "F32", "shape": "x"}, "entry for a is damaged"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, "is stored as F4, which is not supported"),
        (["no", "table"], "entry for a is damaged"),
    ],
)
def test_headers_that_lie(entry, words, tmp_path):
    path = tmp_path / "lies.safetensors"
    _write_header(path, {"a": entry}, b"\0" * 8)
    assert words in _refusal(path)


WRONG_FOLDER = {
    "a LoRA": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 8), "lora_te_x.alpha": ()}, "models/Lora"),
    "a LoRA in diffusers' layout": (
        {"unet.up_blocks.0.attentions.0.to_q.lora_A.weight": (4, 8), "unet.time_embedding.linear_1.lora_A.weight": (4, 8)},
        "models/Lora",
    ),
    "a ControlNet": (
        {"control_model.input_blocks.0.0.weight": (8, 4, 3, 3), "control_model.input_hint_block.0.weight": (8, 3, 3, 3)},
        "models/ControlNet",
    ),
    "a bare ControlNet": ({"input_blocks.0.0.weight": (8, 4, 3, 3), "input_hint_block.0.weight": (8, 3, 3, 3)}, "models/ControlNet"),
    "a diffusers ControlNet": ({"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3), "down_blocks.0.x": (1,)}, "models/ControlNet"),
    "an IP-Adapter": ({"ip_adapter.1.to_k_ip.weight": (4, 4), "image_proj.norm.weight": (4,)}, "models/ControlNet"),
    "a T2I adapter": ({"adapter.body.0.block1.weight": (4, 4)}, "models/ControlNet"),
    "a VAE": ({"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3)}, "models/VAE"),
    "a text encoder": ({"text_model.embeddings.token_embedding.weight": (10, 4)}, "models/text_encoder"),
    "an embedding": ({"emb_params": (2, 768)}, "embeddings"),
    "an SDXL embedding": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "embeddings"),
    "an upscaler": ({"model.0.weight": (8, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (8, 8, 3, 3)}, "models/ESRGAN"),
    "a Flux checkpoint": ({"model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "incomplete: download it again"),
    "a Stable Diffusion 3 checkpoint": ({"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (8,)}, "incomplete"),
    "a Chroma checkpoint": ({"distilled_guidance_layer.in_proj.bias": (8,), "double_blocks.0.x": (8,)}, "incomplete"),
    "a T5 text encoder": ({"encoder.block.0.layer.0.SelfAttention.k.weight": (8, 8)}, "models/text_encoder"),
    "a UMT5 text encoder": ({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (8, 8)}, "video model Wan"),
    "an AnimateDiff motion module": ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (8,)}, "video is not supported"),
    "a hypernetwork": ({"768.0.linear.0.weight": (8, 8), "320.0.linear.0.weight": (8, 8)}, "Hypernetworks are not supported"),
    "something unknown": ({"foo.bar": (2,)}, "matches no known model (1 tensors, the first is foo.bar)"),
}


@pytest.mark.parametrize("kind", WRONG_FOLDER)
def test_other_kinds_of_files_are_named_with_their_folder(kind, tmp_path):
    shapes, words = WRONG_FOLDER[kind]
    path = tmp_path / "file.safetensors"
    save_file({key: _ones(*shape) for key, shape in shapes.items()}, path)
    message = _refusal(path)
    assert words in message
    name = kind.split(" in ")[0].replace(" bare", "").replace(" diffusers", "").replace("an SDXL", "an")
    assert name == "something unknown" or f"is {name}" in message


def _changed(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    state_dict = load_file(source)
    for key, tensor in changes.items():
        if tensor is None:
            state_dict.pop(key)
        else:
            state_dict[key] = tensor
    save_file(state_dict, target)
    return target


def test_missing_keys_are_counted_and_the_first_is_named(good, tmp_path):
    first, second = "model.diffusion_model.time_embed.2.bias", "model.diffusion_model.output_blocks.3.0.in_layers.2.weight"
    message = _refusal(_changed(good, tmp_path / "gap.safetensors", **{first: None, second: None}))
    assert "its UNet lacks 2 of 686 tensors (first: model.diffusion_model." in message


def test_a_missing_tensor_that_determines_the_shape_is_named(good, tmp_path):
    message = _refusal(_changed(good, tmp_path / "gap.safetensors", **{"model.diffusion_model.input_blocks.0.0.weight": None}))
    assert "its UNet lacks model.diffusion_model.input_blocks.0.0.weight" in message


def test_shapes_that_do_not_fit_together(good, tmp_path):
    key = "first_stage_model.decoder.up.0.block.0.conv1.weight"
    message = _refusal(_changed(good, tmp_path / "mixed.safetensors", **{key: _ones(7, 7, 3, 3)}))
    assert f"1 tensors of its VAE have shapes that do not fit together (first: {key} is 7x7x3x3, 32x64x3x3 is needed" in message


def test_a_unet_without_text_is_refused(good, tmp_path):
    path = tmp_path / "unconditional.safetensors"
    save_file({key: tensor for key, tensor in load_file(good).items() if ".transformer_blocks." not in key}, path)
    assert "so it does not use text" in _refusal(path)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ("first_stage_model.", "part.safetensors needs a VAE: put an SD 1.x VAE into models/VAE and choose it under 'VAE / Text Encoder'"),
        ("cond_stage_model.", "needs a CLIP-L text encoder: put the text encoder's file into models/text_encoder and choose it"),
    ],
)
def test_parts_that_a_file_lacks(prefix, words, good, tmp_path):
    path = tmp_path / "part.safetensors"
    save_file({key: tensor for key, tensor in load_file(good).items() if not key.startswith(prefix)}, path)
    assert words in _refusal(path)


def test_text_encoder_of_another_family_is_named_with_both_widths(good, good_xl, tmp_path):
    tensors = load_file(good_xl)
    prefix = key_layout.SDXL_OPEN_CLIP_PREFIX
    save_file({key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}, tmp_path / "bigg.safetensors")
    bare = tmp_path / "bare.safetensors"
    save_file({key: tensor for key, tensor in load_file(good).items() if not key.startswith("cond_stage_model.")}, bare)
    message = _refusal(bare, additional_modules=[tmp_path / "bigg.safetensors"])
    assert "reads text features 64 wide; the one in bigg.safetensors is 96 wide" in message
    lacks_l = tmp_path / "lacks_l.safetensors"
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(key_layout.SDXL_CLIP_L_PREFIX)}, lacks_l)
    assert "lacks_l.safetensors needs a CLIP-L text encoder" in _refusal(lacks_l)


def test_a_lora_chosen_as_vae_is_named(good, tmp_path):
    save_file({"lora_unet_x.lora_down.weight": _ones(4, 4)}, tmp_path / "style.safetensors")
    message = _refusal(good, additional_modules=[tmp_path / "style.safetensors"])
    assert "style.safetensors: was chosen as VAE / Text Encoder, but is a LoRA" in message


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": _ones(32, 5, 3, 3)}, "depth-to-image"),
        ({"model.diffusion_model.input_blocks.0.0.weight": _ones(32, 8, 3, 3)}, "InstructPix2Pix"),
        ({"model.diffusion_model.input_blocks.0.0.weight": _ones(32, 6, 3, 3)}, "6 input channels"),
        ({"edm_mean": _ones(4)}, "Playground v2.5"),
        ({"edm_vpred.sigma_max": _ones(), "edm_vpred.sigma_min": _ones()}, "CosXL"),
    ],
)
def test_unsupported_relatives_are_named(extra, words, good, tmp_path):
    message = _refusal(_changed(good, tmp_path / "relative.safetensors", **extra))
    assert words in message and "supported" in message


# --- pickles ------------------------------------------------------------------------------------------------------------------------


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain", "protocol 4"])
def test_a_hostile_pickle_does_not_run(how, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "model.ckpt"
    content = {"state_dict": {"model.diffusion_model.x": _ones(2)}, "callbacks": _Hostile(marker)}
    if how == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy", pickle_protocol=4 if how == "protocol 4" else 2)
    message = _refusal(path)
    assert not marker.exists()
    assert "nothing in it was run" in message and ".safetensors" in message
    if how in ("zip", "legacy"):
        assert "mkdir" in message


def test_a_trainers_classes_become_stand_ins(tmp_path, monkeypatch):
    """A file from 2022 by PyTorch Lightning: callback classes as keys, numpy numbers, an optimizer's state, a trainer class."""
    import sys
    import types

    package = types.ModuleType("pytorch_lightning")
    callbacks = types.ModuleType("pytorch_lightning.callbacks")

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 3

        def __setstate__(self, state):
            raise AssertionError("a class of the file was used")

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = callbacks.__name__, "ModelCheckpoint"
    callbacks.ModelCheckpoint = ModelCheckpoint
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, callbacks.__name__, callbacks)
    content = {
        "epoch": 0,
        "global_step": 470000,
        "callbacks": {ModelCheckpoint: {"best_model_score": _ones(), "monitor": ModelCheckpoint()}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": _ones(4)}}}],
        "state_dict": {"a.weight": _ones(2, 3), "b": _ones(1).half()},
    }
    path = tmp_path / "trained.ckpt"
    torch.save(content, path)
    allowed_before = torch.serialization.get_safe_globals()
    tensors = load_tensors(path)
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == {
        "a.weight": ((2, 3), torch.float32),
        "b": ((1,), torch.float16),
    }
    assert set(torch.serialization.get_safe_globals()) == set(allowed_before)


def test_names_outside_the_trainers_list_are_refused_even_when_harmless(tmp_path):
    import fractions

    torch.save({"state_dict": {"a": _ones(1)}, "x": fractions.Fraction(1, 2)}, tmp_path / "odd.ckpt")
    with pytest.raises(UnsafePickleError, match=r"fractions\.Fraction"):
        load_tensors(tmp_path / "odd.ckpt")


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"state_dict": {"a": torch.ones(1)}}, {"a"}),
        ({"a": torch.ones(1), "n": 3}, {"a"}),
        ({"params_ema": {"a": torch.ones(1)}}, {"a"}),
        ({"string_to_param": {"*": torch.ones(1, 4)}, "name": "x"}, {"string_to_param.*"}),
        ([1, 2], set()),
    ],
)
def test_wrappers_are_taken_off(content, keys, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    assert load_tensors(tmp_path / "w.pt").keys() == keys


# --- reading ------------------------------------------------------------------------------------------------------------------------


def test_tensors_of_every_type_and_place_are_read(tmp_path):
    """Reference: safetensors' own reader. The header is shifted by one byte, so that no tensor is aligned."""
    tensors = {
        "f32": torch.randn(5, 3),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(2, 2).bfloat16(),
        "fp8": torch.randn(3).to(torch.float8_e4m3fn),
        "i64": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    path, odd = tmp_path / "t.safetensors", tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata={"title": "x"})
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    odd.write_bytes((header_bytes + 1).to_bytes(8, "little") + content[8 : 8 + header_bytes] + b" " + content[8 + header_bytes :])
    for one in (path, odd):
        with open_tensor_file(one) as file:
            assert file.metadata == {"title": "x"} == read_metadata(one)
            for key, tensor in tensors.items():
                read = file.read(key)
                assert read.dtype == tensor.dtype and torch.equal(
                    read.view(torch.uint8) if key == "fp8" else read, tensor.view(torch.uint8) if key == "fp8" else tensor
                )
            assert torch.equal(file.read("f32", dtype=torch.float64), tensors["f32"].double())
            assert torch.equal(file.read("f32", rows=(1, 3)), tensors["f32"][1:3])


def test_metadata_of_other_files_is_empty(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 and so on")
    assert read_metadata(tmp_path / "x.ckpt") == {}
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metadata(tmp_path / "gone.safetensors")


def test_a_distilled_unet_with_the_full_models_block_numbers_is_identified(tmp_path: Path) -> None:
    """Like BK-SDM written by converters that only support two resnets per level: 1, 3, 4, 6 ..."""
    whole = load_file(write_checkpoint(tmp_path / "whole.safetensors", "sd15").path)
    lead = "model.diffusion_model."
    dropped = (*(f"{lead}input_blocks.{number}." for number in (2, 5, 8, 11)), *(f"{lead}output_blocks.{number}." for number in (1, 4, 7, 10)))
    save_file(
        {key: tensor for key, tensor in whole.items() if not key.startswith((f"{lead}middle_block.", *dropped))}, tmp_path / "small.safetensors"
    )
    message = _refusal(tmp_path / "small.safetensors")
    assert "has no model.diffusion_model.input_blocks.2" in message and "small-sd, tiny-sd" in message
