"""The list of families, which a folder that fails to import must not shorten."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from backend.families import registry


def test_a_family_that_fails_to_import_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call fails until the folder imports; then all families are there, each once."""
    names = [family.name for family in registry.all_families()]
    imported = importlib.import_module
    broken = True

    def import_module(name: str, *args: Any) -> ModuleType:
        if broken and name == "backend.families.sdxl":
            raise ImportError("a broken folder")
        return imported(name, *args)

    monkeypatch.setattr(registry, "_built_in", [])
    monkeypatch.setattr(registry.importlib, "import_module", import_module)
    for _ in range(2):
        with pytest.raises(ImportError, match="a broken folder"):
            registry.all_families()
    broken = False
    assert [family.name for family in registry.all_families()] == names
