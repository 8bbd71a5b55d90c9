from __future__ import annotations

import ast
from pathlib import Path

import pytest

from modules.app_config import SCRIPT_DIR

NETWORK_PACKAGES = {"backend.loader", "backend.text_processing.clip_tokenizer", "transformers", "diffusers"}


def imports_inside_functions(path: Path) -> list[tuple[str, bool]]:
    """(package, whether it is under `with network_imports`) for each import executed when a function is called."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, in_function: bool, locked: bool) -> None:
        if isinstance(node, ast.With):
            locked = locked or any("network_imports" in ast.dump(item.context_expr) for item in node.items)
        if in_function and isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, locked))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)), locked)

    visit(ast.parse(path.read_text(encoding="utf8")), False, False)
    return found


@pytest.mark.parametrize("name", ["webui.py", "modules/checkpoints/models.py", "modules/ui/tokens.py"])
def test_what_runs_on_a_thread_of_its_own_imports_networks_under_the_lock(name: str) -> None:
    imports = imports_inside_functions(SCRIPT_DIR / name)
    assert [package for package, locked in imports if package in NETWORK_PACKAGES and not locked] == []


def test_start_imports_networks_under_the_lock() -> None:
    text = (SCRIPT_DIR / "webui.py").read_text(encoding="utf8")
    body = text[text.index("def _import_networks") :]
    assert body.index("network_imports:") < body.index("import_module(")
