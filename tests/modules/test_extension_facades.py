"""Small modules that exist for the names that extensions import from them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from backend.utils import load_torch_file
from modules import deepbooru, lowvram, modelloader, patches, processing, safe, timer, torch_utils, upscaler_utils
from modules.checkpoints import models as sd_models
from modules.sd_hijack import model_hijack
from modules_forge import shared as forge_shared
from modules_forge import utils as forge_utils


def test_a_patch_is_put_back() -> None:
    module: Any = types.ModuleType("patched")
    module.function = len
    assert patches.patch("me", module, "function", max) is len
    assert module.function is max
    assert patches.original("me", module, "function") is len
    with pytest.raises(RuntimeError, match="already"):
        patches.patch("me", module, "function", min)
    patches.undo("me", module, "function")
    assert module.function is len
    with pytest.raises(RuntimeError, match="no patch"):
        patches.undo("me", module, "function")


def test_pickled_code_is_only_run_when_an_extension_says_so(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2), "made": Path("a")}, tmp_path / "code.pt")
    torch.save({"x": torch.ones(2)}, tmp_path / "plain.pt")
    assert safe.load(tmp_path / "plain.pt")["x"].tolist() == [1, 1]
    with pytest.raises(Exception, match=r"[Ww]eights"):
        safe.load(tmp_path / "code.pt")
    assert safe.unsafe_torch_load(tmp_path / "code.pt")["made"] == Path("a")


def test_tensors_are_read_under_every_name(tmp_path: Path) -> None:
    save_file({"x": torch.arange(3)}, tmp_path / "a.safetensors")
    for read in (load_torch_file, sd_models.read_state_dict):
        assert read(str(tmp_path / "a.safetensors"))["x"].tolist() == [0, 1, 2]


def test_a_file_that_is_there_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "model a.pth").write_bytes(b"x")
    assert modelloader.load_file_from_url("http://example.invalid/dir/model%20a.pth?x=1", model_dir=str(tmp_path)) == str(tmp_path / "model a.pth")
    assert modelloader.load_models(str(tmp_path), ext_filter=[".pth"]) == [str(tmp_path / "model a.pth")]
    assert modelloader.load_models(str(tmp_path), ext_filter=[".pth"], ext_blacklist=[" a.pth"]) == []


def test_a_file_is_fetched_whole_with_its_hash_looked_at(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"abc")
    folder = tmp_path / "models"
    sha256 = "ba7816bf8f01cfea"
    path = modelloader.load_file_from_url(source.as_uri(), model_dir=str(folder), progress=False, hash_prefix=sha256)
    assert Path(path).read_bytes() == b"abc"
    with pytest.raises(RuntimeError, match="hash"):
        modelloader.load_file_from_url(source.as_uri(), model_dir=str(folder), file_name="b.bin", progress=False, hash_prefix="0000")
    assert [file.name for file in folder.iterdir()] == ["source.bin"]


def test_first_noise_is_that_of_the_seeds() -> None:
    noise = processing.create_random_tensors((4, 8, 8), [7, 8])
    assert noise.shape == (2, 4, 8, 8)
    assert torch.equal(noise[1], processing.create_random_tensors((4, 8, 8), [8])[0])


def test_questions_of_old_programs_are_answered() -> None:
    assert deepbooru.re_special.sub(r"\\\1", "a_(b)") == r"a_\(b\)"
    assert lowvram.is_enabled(None) is False
    assert model_hijack.get_prompt_lengths("a red cat") == (3, 75)
    assert model_hijack.embedding_db is None
    for name in ("hijack", "undo_hijack", "apply_circular", "redo_hijack", "apply_optimizations"):
        getattr(model_hijack, name)(None)


def test_a_strip_makes_no_map_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge_utils, "MAX_MAP_PX", 2**16)
    for shape in ((1, 2000, 3), (2000, 1, 3)):
        padded, remove_pad = forge_utils.resize_image_with_pad(np.zeros(shape, dtype=np.uint8), 4096)
        whole = remove_pad(padded)
        assert whole.shape[0] * whole.shape[1] <= 2**16 * 1.2 and min(padded.shape[:2]) == 64


def test_pictures_of_preprocessors_get_three_channels_and_multiples_of_64() -> None:
    grey = np.full((50, 70), 7, np.uint8)
    assert forge_utils.HWC3(grey).shape == (50, 70, 3)
    see_through = np.zeros((2, 2, 4), np.uint8)
    assert forge_utils.HWC3(see_through).tolist() == [[[255] * 3] * 2] * 2
    padded, remove_pad = forge_utils.resize_image_with_pad(grey, 100)
    assert padded.shape == (128, 192, 3)
    assert remove_pad(padded).shape == (100, 140, 3)
    assert np.array_equal(forge_utils.pytorch_to_numpy(forge_utils.numpy_to_pytorch(padded))[0], padded)
    with pytest.raises(ValueError, match="8-bit"):
        forge_utils.HWC3(np.zeros((2, 2)))


def test_control_models_are_built_by_the_first_kind_that_knows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")

    def kind(answer: object) -> object:
        return types.SimpleNamespace(try_build_from_state_dict=lambda state_dict, path: answer if "x" in state_dict else None)

    monkeypatch.setattr(forge_shared, "supported_control_models", [])
    assert forge_shared.try_load_supported_control_model(str(tmp_path / "a.safetensors")) is None
    for answer in (None, "second", "third"):
        forge_shared.add_supported_control_model(kind(answer))
    assert forge_shared.try_load_supported_control_model(str(tmp_path / "a.safetensors")) == "second"


class Doubling(torch.nn.Module):
    """Every pixel four times."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x * self.weight, scale_factor=2)


def test_a_network_of_an_extension_enlarges_a_picture_whole_and_in_tiles() -> None:
    picture = Image.linear_gradient("L").resize((40, 24)).convert("RGB")
    picture.paste((250, 10, 60), (3, 3, 9, 9))
    assert upscaler_utils.torch_bgr_to_pil_image(upscaler_utils.pil_image_to_torch_bgr(picture)).tobytes() == picture.tobytes()
    assert upscaler_utils.pil_image_to_torch_bgr(picture)[:, 5, 5].mul(255).round().tolist() == [60, 10, 250]
    wanted = picture.resize((80, 48), Image.Resampling.NEAREST)
    for tile_px in (0, 16):
        made = upscaler_utils.upscale_with_model(Doubling(), picture, tile_size=tile_px, tile_overlap=4)
        difference = np.abs(np.asarray(made, dtype=int) - np.asarray(wanted, dtype=int))
        assert (made.size, difference.max() <= 1) == ((80, 48), True)
    with pytest.raises(ValueError, match="2 pictures"):
        upscaler_utils.torch_bgr_to_pil_image(torch.zeros(2, 3, 4, 4))


def test_a_parameter_and_the_widest_type_of_a_device() -> None:
    assert torch_utils.get_param(Doubling()).shape == (1,)
    assert torch_utils.float64(torch.zeros(1)) is torch.float64


def test_parts_of_a_timer_add_up() -> None:
    taken = timer.Timer()
    with taken.subcategory("load"):
        taken.record("read", extra_time=2)
    taken.record("rest")
    assert list(taken.records) == ["load/read", "load", "rest"]
    assert 2 <= taken.records["load/read"] < 3
    assert taken.dump() == {"total": taken.total, "records": taken.records}
    taken.reset()
    assert taken.records == {}
