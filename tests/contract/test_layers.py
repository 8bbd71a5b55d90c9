"""Imports point one way: launch > webui > modules > modules_forge > backend; guests are imported by nobody."""

from __future__ import annotations

import ast

import pytest

from tests.contract.sources import LAYERS, PACKAGES, ROOT_DIR, Source, imported_names, product_sources, runtime_nodes

NOT_IN_BACKEND = {"gradio", "fastapi", "starlette", "uvicorn", "argparse", "gradio_client"}
# A command of its own, `python -m backend.parallel.simulate`, that nothing imports: it predicts plans for cards without starting the WebUI.
COMMANDS = {"backend/parallel/simulate.py": "argparse"}
# What the page and the API are made of; neither may know the other.
PAGE, API = "modules.ui", "modules.api"


def find_upward_imports(source: Source) -> list[str]:
    own = LAYERS.index(source.top) if source.top in LAYERS else len(LAYERS)
    found = []
    for name, line in imported_names(source):
        top = name.split(".")[0]
        if (top in LAYERS and LAYERS.index(top) > own) or top in ("tools", "tests", "benchmarks"):
            found.append(f"{source.name}:{line} imports {name}")
    return found


def make_source(name: str, text: str) -> Source:
    return Source(ROOT_DIR.joinpath(name).relative_to(ROOT_DIR), text, ast.parse(text))


def test_imports_point_downwards() -> None:
    assert [line for source in product_sources() for line in find_upward_imports(source)] == []


@pytest.mark.parametrize(
    ("name", "text", "num_found"),
    [
        ("backend/x.py", "def f():\n    import modules.shared", 1),
        ("backend/x.py", "from modules_forge import shared", 2),
        ("backend/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import modules.shared", 0),
        ("modules/x.py", "import webui", 1),
        ("modules/x.py", "import backend.args, modules_forge.shared", 0),
        ("webui.py", "from tools import measure", 2),
    ],
)
def test_the_search_finds_upward_imports(name: str, text: str, num_found: int) -> None:
    assert len(find_upward_imports(make_source(name, text))) == num_found


def test_the_engine_knows_no_page_no_server_and_no_command_line() -> None:
    found = [
        f"{s.name}:{line} imports {name}"
        for s in product_sources()
        for name, line in imported_names(s)
        if s.top == "backend" and name.split(".")[0] in NOT_IN_BACKEND and name != COMMANDS.get(s.name)
    ]
    assert found == []


def test_commands_are_imported_by_nobody() -> None:
    modules = {name.removesuffix(".py").replace("/", ".") for name in COMMANDS}
    assert [f"{source.name}:{line}" for source in product_sources() for name, line in imported_names(source) if name in modules] == []


def test_page_and_api_do_not_import_each_other() -> None:
    found = []
    for source in product_sources():
        own = ".".join(source.path.with_suffix("").parts)
        for name, line in imported_names(source):
            if (own.startswith(PAGE) and name.startswith(API)) or (own.startswith(API) and name.startswith(PAGE)):
                found.append(f"{source.name}:{line} imports {name}")
    assert found == []


def test_residents_do_not_read_the_lobby() -> None:
    """`modules.shared` is filled by webui.py and read by guests; whoever lives here takes what it needs as arguments."""
    found = [
        f"{source.name}:{line}"
        for source in product_sources()
        if source.top in LAYERS[:3]
        for name, line in imported_names(source)
        if name == "modules.shared" or name.startswith("modules.shared.")
    ]
    assert found == []


def test_no_relative_imports() -> None:
    found = [
        f"{source.name}:{node.lineno}"
        for source in product_sources()
        if source.top != "extensions-builtin"
        for node in runtime_nodes(source.tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert found == []


def test_guests_are_imported_by_nobody() -> None:
    """Folders of built-in extensions are no packages, so the only way to them is the script host."""
    guests = {path.name for path in (ROOT_DIR / "extensions-builtin").glob("*") if path.is_dir()}
    found = [
        f"{s.name}:{line} imports {name}"
        for s in product_sources()
        if s.top in PACKAGES[:3]
        for name, line in imported_names(s)
        if name.split(".")[0] in guests
    ]
    assert found == []
