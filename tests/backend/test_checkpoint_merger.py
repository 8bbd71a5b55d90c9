"""Merged checkpoints. Reference: the formulas on tensors that safetensors has read; quantized outputs against the gguf package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backend import checkpoint_converter
from backend.checkpoint_converter import ConversionError
from backend.checkpoint_merger import ADD_DIFFERENCE, NO_INTERPOLATION, WEIGHTED_SUM, Merge, merge_checkpoints
from tests.support.checkpoints import write_checkpoint

INPUT = "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tmp_path_factory.mktemp("merge"))
    for seed, name in enumerate("abc"):
        write_checkpoint(folder / f"{name}.safetensors", "sd15", seed=seed, is_shallow=True)
    write_checkpoint(folder / "xl.safetensors", "sdxl", is_shallow=True)
    return folder


def merge(folder: Path, target: Path, primary: str = "a", **job: Any) -> Path:
    models = {name: folder / f"{job.pop(name)}.safetensors" for name in ("secondary", "tertiary", "vae") if name in job}
    merge_checkpoints(Merge(primary=folder / f"{primary}.safetensors", target=target, **models, **job))
    return target


def tensors(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [{key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()} for name in "abc"]


@pytest.mark.parametrize("multiplier", [0.0, 0.3, 1.0])
def test_a_weighted_sum_is_the_formula(folder: Path, tmp_path: Path, multiplier: float) -> None:
    a, b, _ = tensors(folder)
    written = load_file(merge(folder, tmp_path / "m.safetensors", secondary="b", method=WEIGHTED_SUM, multiplier=multiplier, to="fp32"))
    assert set(written) == set(a)
    for key, value in written.items():
        wanted = (1 - multiplier) * a[key].double() + multiplier * b[key].double()
        assert torch.allclose(value.double(), wanted, rtol=1e-6, atol=1e-7), key


def test_an_added_difference_is_the_formula_in_the_type_that_was_asked_for(folder: Path, tmp_path: Path) -> None:
    a, b, c = tensors(folder)
    written = load_file(merge(folder, tmp_path / "m.safetensors", secondary="b", tertiary="c", method=ADD_DIFFERENCE, multiplier=0.7, to="fp16"))
    for key, value in written.items():
        if value.is_floating_point():
            assert value.dtype == torch.float16
            assert torch.allclose(value.float(), a[key] + 0.7 * (b[key] - c[key]), rtol=2e-3, atol=1e-4), key


def test_a_quantized_output_is_what_the_package_makes_of_the_formula(folder: Path, tmp_path: Path) -> None:
    a, b, _ = tensors(folder)
    target = merge(folder, tmp_path / "m.gguf", secondary="b", multiplier=0.5, to="q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0}
    assert found
    for name, tensor in found.items():
        key = next(key for key in a if key.endswith(name))
        wanted = gguf.quants.quantize((a[key] + (b[key] - a[key]) * 0.5).numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert (wanted == tensor.data.reshape(wanted.shape)).all(), name


def test_an_inpainting_model_keeps_its_further_channels(folder: Path, tmp_path: Path) -> None:
    _, b, _ = tensors(folder)
    wide = {**load_file(folder / "a.safetensors")}
    wide[INPUT] = torch.cat([wide[INPUT], torch.randn(wide[INPUT].shape[0], 5, 3, 3, dtype=wide[INPUT].dtype)], 1)
    save_file(wide, tmp_path / "inpaint.safetensors")
    merge_checkpoints(
        Merge(primary=tmp_path / "inpaint.safetensors", secondary=folder / "b.safetensors", target=tmp_path / "m.safetensors", multiplier=1.0)
    )
    written = load_file(tmp_path / "m.safetensors")[INPUT].float()
    assert torch.allclose(written[:, :4], b[INPUT], atol=1e-6)
    assert torch.equal(written[:, 4:], wide[INPUT][:, 4:].float())


def test_a_vae_is_baked_in_and_names_are_left_out(folder: Path, tmp_path: Path) -> None:
    a, b, _ = tensors(folder)
    parts = {key.removeprefix(VAE): value for key, value in load_file(folder / "b.safetensors").items() if key.startswith(VAE)}
    save_file(parts, tmp_path / "v.safetensors")
    merge_checkpoints(
        Merge(
            primary=folder / "a.safetensors", target=tmp_path / "m.safetensors", method=NO_INTERPOLATION, vae=tmp_path / "v.safetensors",
            leave_out=("cond_stage_model.*",),
        )
    )  # fmt: skip
    written = load_file(tmp_path / "m.safetensors")
    assert not any(key.startswith("cond_stage_model.") for key in written)
    for key, value in written.items():
        assert torch.equal(value.float(), (b if key.startswith(VAE) else a)[key]), key
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sd_merge_recipe"])["vae"] == "v.safetensors"


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"secondary": "xl"}, "only models of one family"),
        ({"secondary": "b", "method": ADD_DIFFERENCE}, "needs a third model"),
        ({"method": WEIGHTED_SUM}, "needs a second model"),
        ({"secondary": "b", "multiplier": float("nan")}, "Multiplier nan"),
        ({"secondary": "b", "method": "Sum"}, "is unknown"),
        ({"secondary": "b", "to": "q8_0"}, ".gguf"),
        ({"method": NO_INTERPOLATION, "leave_out": ("*",)}, "no all part"),
    ],
)
def test_what_cannot_be_mixed_is_said_and_nothing_is_written(folder: Path, tmp_path: Path, job: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        merge(folder, tmp_path / "m.safetensors", **job)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_on_the_way_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint_converter, "write_safetensors", lambda path, *rest: (path.write_bytes(b"half"), fail()))
    with pytest.raises(OSError, match="disk full"):
        merge(folder, tmp_path / "m.safetensors", secondary="b")
    assert list(tmp_path.iterdir()) == []
