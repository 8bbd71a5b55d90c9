"""Lists of model files include linked subfolders, and find a file by the name that a Windows client writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from backend.text_processing.embedding import EmbeddingError
from backend.text_processing.embedding_creation import clean_name
from modules.checkpoints.vae_files import ModuleRegistry, UnknownModuleError
from modules.modelloader import load_models
from modules.pictures.upscaler_models import UpscalerModels
from modules_forge import shared
from modules_forge.picture_towers import tower_files


def _image_encoders(root: Path) -> list[str]:
    folders = shared.preprocessor_dir, shared.controlnet_dir, shared.diffusers_dir
    shared.configure_folders(controlnet_dir=root.parent / "none" / "x", preprocessor_dir=root, diffusers_dir=root)
    try:
        return [path.stem for path in tower_files()]
    finally:
        controlnet, preprocessor, diffusers = (folders[place] for place in (1, 0, 2))
        shared.configure_folders(controlnet_dir=Path(controlnet), preprocessor_dir=Path(preprocessor), diffusers_dir=Path(diffusers))


def _modules(root: Path) -> list[str]:
    registry = ModuleRegistry([root], [])
    registry.refresh()
    return [path.stem for path in registry.files.values()]


LISTS: dict[str, Callable[[Path], list[str]]] = {
    "image encoders of IP-Adapter": _image_encoders,
    "VAE": _modules,
    "text encoders": lambda root: [path.stem for path in _refreshed([], [root]).files.values()],
    "upscalers": lambda root: [entry.name for entry in UpscalerModels([root]).scalers],
    "files that an extension asks for": lambda root: [Path(path).stem for path in load_models(str(root), ext_filter=[".safetensors"])],
}


def _refreshed(vaes: list[Path], text_encoders: list[Path]) -> ModuleRegistry:
    registry = ModuleRegistry(vaes, text_encoders)
    registry.refresh()
    return registry


@pytest.mark.parametrize("kind", LISTS)
def test_linked_folders_are_looked_into_once(kind: str, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "sub").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (root / "sub" / "one.safetensors").write_bytes(b"x")
    (elsewhere / "deep" / "two.safetensors").write_bytes(b"x")
    (root / "sub" / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    assert sorted(LISTS[kind](root)) == ["one", "two"]


@pytest.mark.parametrize("name", ["sub\\Soft.safetensors", "SUB\\soft", "sub/Soft", "soft.safetensors"])
def test_a_vae_is_found_by_the_names_that_windows_clients_write(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "Soft.safetensors").write_bytes(b"x")
    (tmp_path / "hard.safetensors").write_bytes(b"x")
    assert ModuleRegistry([tmp_path], []).find(name).name == "Soft.safetensors"


def test_a_misspelt_vae_is_told_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "soft.safetensors").write_bytes(b"x")
    with pytest.raises(UnknownModuleError, match=r"nearest are 'soft.safetensors' \(of 1\)"):
        ModuleRegistry([tmp_path], []).find("sub\\sotf.safetensors")


@pytest.mark.parametrize("name", ["a" * 4000, "\u00e9" * 150])
def test_an_embedding_s_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(EmbeddingError, match=r"letters\) is too long for a file name"):
        clean_name(name)
