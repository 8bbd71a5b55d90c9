"""Imports point one way: launch > webui > modules > modules_forge > backend; nobody imports guests."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.contract.sources import (
    LAYERS,
    PACKAGES,
    ROOT_DIR,
    Source,
    find_cycles,
    imported_names,
    module_name,
    product_sources,
    read_imports,
    runtime_nodes,
)

NOT_IN_BACKEND = {"gradio", "fastapi", "starlette", "uvicorn", "argparse", "gradio_client"}
# A separate command, `python -m backend.parallel.simulate`, that nothing imports: it predicts plans for GPUs without starting the WebUI.
COMMANDS = {"backend/parallel/simulate.py": "argparse"}
# The packages of the page and of the API; neither may import the other.
PAGE, API = "modules.ui.tabs", "modules.api"


# The engine's packages and files, lowest first. Each may import its own rank and below. The longest matching name counts. A file next to
# the packages that is not listed ranks just above what it imports.
BACKEND_RANKS = (
    ("args",),
    ("devices",),
    ("profiler",),
    ("storage",),
    ("memory", "memory_management", "control_dtype"),
    (
        *("checkpoint_config", "checkpoint_file", "checkpoint_identity", "checkpoint_layout", "checkpoint_pickle", "checkpoint_prediction"),
        *("key_layout", "state_dict", "original_config", "attention", "utils", "misc", "operations"),
        "denoiser_types",
    ),
    ("nn",),
    ("modules.k_prediction",),  # Forge's name for a file that only has formulas
    ("sampling", "text_processing"),
    ("families",),
    ("patcher",),
    ("parallel",),
    ("sampling.sampling_function",),  # Forge's name for a file that wraps a run: it starts the session
    ("modules",),
    ("clip_vision", "control_lora", "controlnet_loader", "ip_adapter"),
    ("diffusion_engine",),
    ("loader",),
)


@cache
def find_rank(module: str) -> int:
    """Rank of `backend.x.y`. Raises: LookupError for a package without one."""
    fitting = [
        (len(name), rank)
        for rank, names in enumerate(BACKEND_RANKS)
        for name in names
        if module == f"backend.{name}" or module.startswith(f"backend.{name}.")
    ]
    if fitting:
        return max(fitting)[1]
    imports = read_imports(product_sources()).get(module)
    if imports is None or module.count(".") != 1:
        raise LookupError(f"{module} has no place in BACKEND_RANKS; give its package one")
    return max((find_rank(name) for name in imports if name.startswith("backend.")), default=0)


def find_upward_imports_in_backend(source: Source, modules: frozenset[str]) -> list[str]:
    own = find_rank(module_name(source))
    return [f"{source.name}:{line} imports {name}" for name, line in imported_names(source) if name in modules and find_rank(name) > own]


def test_packages_of_the_engine_point_downwards() -> None:
    sources = [source for source in product_sources() if source.top == "backend" and source.path.name != "__init__.py"]
    modules = frozenset(module_name(source) for source in sources)
    assert [line for source in sources for line in find_upward_imports_in_backend(source, modules)] == []


@pytest.mark.parametrize(
    ("name", "text", "num_found"),
    [
        ("backend/patcher/x.py", "from backend.modules.k_model import KModel", 1),
        ("backend/patcher/x.py", "def f():\n    from backend.parallel.planning.plan import Plan", 1),
        ("backend/patcher/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from backend.parallel.planning.plan import Plan", 0),
        ("backend/parallel/x.py", "from backend.patcher import vae", 0),
        ("backend/sampling/x.py", "from backend.modules.k_prediction import Prediction", 0),
    ],
)
def test_the_search_finds_upward_imports_in_the_engine(name: str, text: str, num_found: int) -> None:
    modules = frozenset(module_name(source) for source in product_sources() if source.top == "backend")
    assert len(find_upward_imports_in_backend(make_source(name, text), modules)) == num_found


def test_there_are_no_import_cycles() -> None:
    """Imports inside functions count too."""
    assert find_cycles(read_imports(product_sources())) == []


# What a job runs through: none of it asks for the installed application, which has the page and the API too.
BELOW_PROCESSING = ("processing", "samplers", "prompts", "pictures", "jobs", "infotext", "checkpoints", "settings")


def test_nothing_below_processing_knows_the_application() -> None:
    found = [
        f"{source.name}:{line}"
        for source in product_sources()
        if source.top == "modules" and source.path.parts[1] in BELOW_PROCESSING
        for name, line in imported_names(source)
        if name.startswith("modules.application")
    ]
    assert found == []


def test_steps_call_functions_and_not_methods_of_the_request() -> None:
    """A1111's methods are there for extensions; a step asks `overrides` whether one replaced them."""
    methods = {
        node.name
        for source in product_sources()
        if source.name == "modules/processing/request.py"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef) and "a1111_method" in {ast.unparse(decorator) for decorator in node.decorator_list}
    }
    assert {"init", "sample", "setup_conds", "sample_hr_pass"} < methods
    found = [
        f"{source.name}:{node.lineno} {ast.unparse(node.func)}"
        for source in product_sources()
        if source.top == "modules"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "p" and node.func.attr in methods
    ]
    assert found == []


def test_the_search_finds_cycles() -> None:
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}) == [{"a", "b", "c"}]
    assert find_cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


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
    """webui.py fills `modules.shared` and guests read it; this program's own modules take what they need as arguments."""
    found = [
        f"{source.name}:{line}"
        for source in product_sources()
        if source.top in LAYERS[:3]
        for name, line in imported_names(source)
        if name == "modules.shared" or name.startswith("modules.shared.")
    ]
    assert found == []


def test_one_file_knows_ray() -> None:
    """A cluster's jobs, routing and files are ours and are tested without Ray; `modules.cluster` is the only room that knows clusters at all."""
    found = {source.name for source in product_sources() for name, _ in imported_names(source) if name.split(".")[0] == "ray"}
    assert found == {"modules/cluster/ray_serve.py"}
    rooms = {source.name for source in product_sources() for name, _ in imported_names(source) if name.startswith("modules.cluster")}
    assert {name for name in rooms if not name.startswith("modules/cluster/")} == {"webui.py"}


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
    """Folders of built-in extensions are not packages, so only the script host can load them."""
    guests = {path.name for path in (ROOT_DIR / "extensions-builtin").glob("*") if path.is_dir()}
    found = [
        f"{s.name}:{line} imports {name}"
        for s in product_sources()
        if s.top in PACKAGES[:3]
        for name, line in imported_names(s)
        if name.split(".")[0] in guests
    ]
    assert found == []
