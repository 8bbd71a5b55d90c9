"""Rules for every file: no bare except, no print, argv and environment only in the launchers, a module docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.sources import Source, product_sources

# Where any exception may be caught, once each, because a fault of one job, one request, one script must not end the server.
WALLS = {
    "launch.py": "the launcher",
    "modules/jobs/queue.py": "the job worker, and the page's handlers that wait for it",
    "modules/api/routes.py": "the API's handlers",
    "modules/errors.py": "code of extensions, behind the script host",
}
# Entry points, which read argv and the environment: of the server, and of a machine that joins a cluster.
LAUNCHERS = {"launch.py", "modules/cluster/commands.py"}
# Where everything that is raised on a thread is carried to whoever waits for it, and raised there.
CARRIERS = {"backend/parallel/running/worker.py": "the slots' workers"}


def calls_of(source: Source, name: str) -> Iterator[int]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node.lineno


def test_no_bare_except() -> None:
    found = [
        f"{source.name}:{node.lineno}"
        for source in product_sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert found == []


def _swallows_everything(handler: ast.ExceptHandler) -> bool:
    """`except Exception` without re-raising."""
    names = [node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)] if handler.type else []
    raises = any(isinstance(node, ast.Raise) for statement in handler.body for node in ast.walk(statement))
    return bool({"Exception", "BaseException"} & set(names)) and not raises


def _suppresses_everything(call: ast.Call) -> bool:
    """`suppress(Exception)`."""
    return ast.unparse(call.func).split(".")[-1] == "suppress" and any(ast.unparse(kind) in ("Exception", "BaseException") for kind in call.args)


def places_that_catch_everything(source: Source) -> list[int]:
    nodes = list(ast.walk(source.tree))
    handlers = [node.lineno for node in nodes if isinstance(node, ast.ExceptHandler) and _swallows_everything(node)]
    return handlers + [node.lineno for node in nodes if isinstance(node, ast.Call) and _suppresses_everything(node)]


def test_everything_is_caught_only_at_the_four_walls() -> None:
    found = {source.name: lines for source in product_sources() if (lines := places_that_catch_everything(source)) and source.name not in CARRIERS}
    assert sorted(found) == sorted(WALLS)
    assert {name: lines for name, lines in found.items() if len(lines) > 1} == {}


@pytest.mark.parametrize(
    ("text", "num_found"),
    [
        ("try:\n    f()\nexcept Exception:\n    pass", 1),
        ("try:\n    f()\nexcept (ValueError, BaseException) as error:\n    g(error)", 1),
        ("try:\n    f()\nexcept Exception:\n    g()\n    raise", 0),
        ("with contextlib.suppress(Exception):\n    f()", 1),
        ("with suppress(OSError, ValueError):\n    f()", 0),
    ],
)
def test_the_search_finds_what_catches_everything(text: str, num_found: int) -> None:
    assert len(places_that_catch_everything(Source(Path("modules/x.py"), text, ast.parse(text)))) == num_found


def test_no_print_outside_the_launcher() -> None:
    assert [f"{source.name}:{line}" for source in product_sources() if source.name != "launch.py" for line in calls_of(source, "print")] == []


def test_argv_and_the_environment_are_read_in_the_launchers_alone() -> None:
    names = {("sys", "argv"), ("os", "environ"), ("os", "getenv"), ("os", "putenv")}
    found = [
        f"{source.name}:{node.lineno} {node.value.id}.{node.attr}"
        for source in product_sources()
        if source.name not in LAUNCHERS
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in names
    ]
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    found = [source.name for source in product_sources() if source.tree.body and not ast.get_docstring(source.tree)]
    assert found == []


def test_syntax_is_that_of_the_oldest_python() -> None:
    for source in product_sources():
        ast.parse(source.text, source.name, feature_version=(3, 10))


def test_the_launcher_can_be_read_by_older_pythons() -> None:
    """Old Pythons must be able to parse it up to the error message: no annotations, no f-strings, no walrus, nothing after 3.4."""
    source = next(source for source in product_sources() if source.name == "launch.py")
    ast.parse(source.text, source.name, feature_version=(3, 4))
    modern = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Match, ast.Nonlocal)
    assert [node.lineno for node in ast.walk(source.tree) if isinstance(node, modern)] == []
    functions = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.returns or node.args.kwonlyargs or any(arg.annotation for arg in node.args.args)] == []
