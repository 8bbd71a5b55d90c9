"""The list of packages matches the imports: nothing missing, nothing unused, every entry pinned and explained."""

from __future__ import annotations

import re
import sys

from tests.contract.sources import LAYERS, ROOT_DIR, imported_names, product_sources

IMPORT_NAMES = {"pillow": "PIL", "nvidia-ml-py": "pynvml", "pyyaml": "yaml"}
OPTIONAL = {"xformers", "spandrel", "ray"}  # installed by a flag, or by users who want upscaler files
USED_BY_OTHERS = {"accelerate": "diffusers places and offloads weights with it"}
DECISION = ROOT_DIR / "docs" / "decisions" / "003-dependencies.md"


def pinned_lines(name: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in (ROOT_DIR / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def package_names() -> set[str]:
    return {re.split(r"[=<>!~; ]", line)[0].lower() for line in pinned_lines("requirements_versions.txt")}


def imported_packages() -> set[str]:
    ours = {*LAYERS, "extensions-builtin", "tools"}
    tops = {name.split(".")[0] for source in product_sources() if source.top in LAYERS for name, _ in imported_names(source)}
    return tops - ours - set(sys.stdlib_module_names) - OPTIONAL


PINNED = re.compile(r"[\w.-]+(\[\w+\])?==[\w.+]+(; python_version (<|>=) \"3\.\d+\")?")


def test_every_line_is_pinned() -> None:
    for name in ("requirements_versions.txt", "requirements_test.txt", "requirements_cluster.txt"):
        assert [line for line in pinned_lines(name) if not PINNED.fullmatch(line)] == []


def test_every_import_has_its_requirement() -> None:
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in package_names()}
    assert imported_packages() - known == set()


def test_every_requirement_is_used() -> None:
    used = imported_packages()
    idle = {name for name in package_names() if IMPORT_NAMES.get(name, name.replace("-", "_")) not in used}
    assert idle - set(USED_BY_OTHERS) == set()


def test_every_requirement_is_explained() -> None:
    text = DECISION.read_text(encoding="utf-8")
    assert [name for name in package_names() if f"| {name} |" not in text] == []
