"""The product's source files, parsed, for tests that read code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT_DIR = Path(__file__).resolve().parents[2]
PACKAGES = ("modules", "modules_forge", "backend", "extensions-builtin")
LAYERS = ("backend", "modules_forge", "modules", "webui", "launch")  # lowest first


@dataclass(frozen=True)
class Source:
    path: Path  # relative to the root
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return self.path.as_posix()

    @property
    def top(self) -> str:
        """The layer: `backend`, `launch`, `extensions-builtin` ..."""
        return self.path.parts[0].removesuffix(".py")


@cache
def product_sources() -> tuple[Source, ...]:
    """launch.py, webui.py and all of modules/, modules_forge/, backend/ and extensions-builtin/."""
    paths = [path for path in (ROOT_DIR / "launch.py", ROOT_DIR / "webui.py") if path.exists()]
    for package in PACKAGES:
        paths += sorted((ROOT_DIR / package).rglob("*.py"))
    return tuple(_parse(path) for path in paths)


def _parse(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path.relative_to(ROOT_DIR), text, ast.parse(text, str(path)))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for node in child.orelse:
                yield node
                yield from runtime_nodes(node)
            continue
        yield child
        yield from runtime_nodes(child)


def imported_names(source: Source) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported at run time, also inside functions; `from a import b` gives `a` and `a.b`."""
    for node in runtime_nodes(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def module_name(source: Source) -> str:
    """`backend/nn/__init__.py` -> `backend.nn`."""
    parts = list(source.path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
