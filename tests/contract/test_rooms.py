"""The application's packages: each docstring gives a reading order, and flat files next to them only have names that extensions import."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

from tests.contract.sources import LAYERS, ROOT_DIR, imported_names, product_sources

TOPS = ("backend", "modules", "modules_forge", "tools")
FEW_FILES = 3
"""Packages with fewer files need a sentence only."""
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


def list_packages() -> dict[str, str]:
    """Path -> docstring, for every package of the product and its tools."""
    inits = sorted(path for top in TOPS for path in (ROOT_DIR / top).rglob("__init__.py"))
    return {path.parent.relative_to(ROOT_DIR).as_posix(): ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in inits}


def list_files(package: str) -> set[str]:
    """Modules of a package, without names that extensions import: all flat files of `modules`, and faces."""
    paths = (ROOT_DIR / package).glob("*.py")
    files = {path.stem for path in paths if "sys.modules[__name__] = " not in path.read_text(encoding="utf-8")}
    return files - {"__init__", "__main__"} if package != "modules" else {"app_config", "application"}


def names_in(text: str) -> set[str]:
    """Words that begin with a backquote, without quotes and punctuation."""
    return {word.strip("`,;:().").removesuffix(".py") for word in text.split() if word.startswith(("`", "(`"))}


PACKAGES = list_packages()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_in_what_order_to_read_it_and_gives_an_example(package: str) -> None:
    assert PACKAGES[package]
    if len(list_files(package)) >= FEW_FILES:
        assert "Reading order:" in PACKAGES[package]
        assert "Example:" in PACKAGES[package]


@pytest.mark.parametrize("package", [package for package in PACKAGES if len(list_files(package)) >= FEW_FILES])
def test_a_package_names_its_files(package: str) -> None:
    """All of them, one by one or as `profile_*`."""
    named = names_in(PACKAGES[package])
    stems = [name[:-1] for name in named if name.endswith("*")]
    assert {file for file in list_files(package) if file not in named and not file.startswith(tuple(stems))} == set()


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
