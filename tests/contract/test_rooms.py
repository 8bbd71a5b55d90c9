"""The application's packages: each docstring gives a reading order, and flat files next to them only have names that extensions import."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

from tests.contract.sources import LAYERS, ROOT_DIR, imported_names, product_sources

ROOMS = (
    *("processing", "prompts", "samplers", "scripts", "ui", "launch", "infotext", "pictures", "checkpoints", "jobs", "settings", "http_edge"),
    *("cluster", "history"),
)
PARALLEL_ROOMS = ("planning", "running", "placing", "exchange", "vae")
PACKAGES = [f"modules/{room}" for room in ROOMS] + ["backend/parallel", *(f"backend/parallel/{room}" for room in PARALLEL_ROOMS)]
LOBBY = {"__init__", "app_config", "application", "nearest_names", "util"}
"""`util` is a name of A1111 that the listed extensions reach through `modules.shared`. The others are ours: the application that every room and the
built-in extensions are given, its configuration, and the wording of "nearest are ..." that extensions use too."""


def list_faces() -> dict[str, str]:
    """Name that extensions import -> where the module is."""
    faces = {}
    for path in sorted((ROOT_DIR / "modules").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "sys.modules[__name__] = " in text:
            (node,) = (node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) and node.module != "__future__")
            faces[f"modules.{path.stem}"] = f"{node.module}.{node.names[0].name}"
    return faces


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_says_in_what_order_to_read_it_and_gives_an_example(package: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT_DIR / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert "Reading order:" in text
    assert "Example:" in text


@pytest.mark.parametrize("package", PACKAGES)
def test_the_files_a_room_names_are_there(package: str) -> None:
    """All files in a package are listed, one by one or as `profile_*`."""
    text = ast.get_docstring(ast.parse((ROOT_DIR / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    order = " ".join(part for part in text.split("\n\n") if part.startswith("Reading order:"))
    files = {path.stem for path in (ROOT_DIR / package).glob("*.py")} - {"__init__"}
    named = {word.strip("`,;().").removesuffix(".py") for word in order.split() if word.startswith(("`", "(`"))}
    assert {stem for stem in files if stem not in named and not any(name.endswith("*") and stem.startswith(name[:-1]) for name in named)} == set()


def test_a_face_is_the_very_module_in_its_room() -> None:
    faces = list_faces()
    assert len(faces) > 30
    for face, home in faces.items():
        assert importlib.import_module(face) is importlib.import_module(home)
        assert getattr(sys.modules["modules"], face.removeprefix("modules.")) is sys.modules[home]


def test_residents_do_not_go_through_faces() -> None:
    faces = set(list_faces())
    found = [
        f"{source.name}:{line} imports {name}"
        for source in product_sources()
        if source.top in LAYERS and f"modules.{Path(source.name).stem}" not in faces
        for name, line in imported_names(source)
        if name in faces
    ]
    assert found == []


def test_flat_files_are_names_that_extensions_import() -> None:
    text = (Path(__file__).parent / "data" / "extension_names.txt").read_text(encoding="utf-8")
    imported = {line.split()[1].split(".")[1] for line in text.splitlines() if not line.startswith("#") and line.split()[1].startswith("modules.")}
    flat = {path.stem for path in (ROOT_DIR / "modules").glob("*.py")}
    assert {name for name in flat - imported - LOBBY if f"modules.{name}" not in list_faces()} == set()
