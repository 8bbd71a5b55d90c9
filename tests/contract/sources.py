"""The product's source files, parsed, for tests that inspect code."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
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
def product_sources(root: Path = ROOT_DIR) -> tuple[Source, ...]:
    """launch.py, webui.py and all of modules/, modules_forge/, backend/ and extensions-builtin/."""
    paths = [path for path in (root / "launch.py", root / "webui.py") if path.exists()]
    for package in PACKAGES:
        paths += sorted((root / package).rglob("*.py"))
    return tuple(_parse(path, root) for path in paths)


def _parse(path: Path, root: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    return Source(path.relative_to(root), text, ast.parse(text, str(path)))


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for node in child.orelse:
                yield node
                yield from runtime_nodes(node)
            continue
        yield child
        yield from runtime_nodes(child)


def imported_names(source: Source) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported at run time, including inside functions; `from a import b` gives `a` and `a.b`."""
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


def find_cycles(imports: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules each of which imports every other, by whatever way (Tarjan 1972, strongly connected components)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            at = stack.index(module)
            group = set(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for module in sorted(imports):
        if module not in order:
            visit(module)
    return found


@cache
def read_imports(product: tuple[Source, ...]) -> dict[str, set[str]]:
    """What each module of the layers imports at run time, also inside functions."""
    sources = {module_name(source): source for source in product if source.top in LAYERS}
    return {name: {other for other in _imported_modules(source, sources) if other in sources and other != name} for name, source in sources.items()}


def _imported_modules(source: Source, modules: Mapping[str, Source]) -> set[str]:
    """`from package import file` asks for the file alone, whatever the package's own names are."""
    found = {name for name, _ in imported_names(source)}
    imports = [node for node in runtime_nodes(source.tree) if isinstance(node, ast.ImportFrom)]
    taken = {node.module for node in imports for alias in node.names if f"{node.module}.{alias.name}" not in modules}
    return found - ({node.module or "" for node in imports} - taken)
