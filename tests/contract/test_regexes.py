"""Every regular expression of the program matches in linear time, for any text from a client or a file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.regex_growth import superlinear_text

ROOT = Path(__file__).resolve().parents[2]
USES = {"search": "search", "sub": "search", "subn": "search", "split": "search", "findall": "search", "finditer": "search"} | {
    "match": "match",
    "fullmatch": "fullmatch",
}
NOT_READ_WITH = {
    ("modules/prompts/extra_networks.py", "re_extra_net"): "a name that extensions import; the parser next to it does not use it",
}


@dataclass(frozen=True)
class Expression:
    file: str
    line: int
    name: str
    pattern: str
    flags: int
    use: str


def expressions() -> Iterator[Expression]:
    files = [path for top in ("backend", "modules", "modules_forge", "extensions-builtin") for path in sorted((ROOT / top).rglob("*.py"))]
    for path in (ROOT / "launch.py", ROOT / "webui.py", *files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from _in_module(tree, path.relative_to(ROOT).as_posix())


def _in_module(tree: ast.Module, file: str) -> Iterator[Expression]:
    compiled: dict[str, tuple[ast.Call, str, int]] = {}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Assign)):
        if isinstance(node.value, ast.Call) and _re_function(node.value) == "compile" and isinstance(node.targets[0], ast.Name):
            compiled[node.targets[0].id] = (node.value, _pattern(node.value.args[0]), _flags(node.value))
    for call in calls:
        if (function := _re_function(call)) in USES:
            yield Expression(file, call.lineno, ast.unparse(call.args[0]), _pattern(call.args[0]), _flags(call), USES[str(function)])
        elif function == "compile" and call not in [known for known, *_ in compiled.values()] and isinstance(call.args[0], ast.Constant):
            yield Expression(file, call.lineno, "", _pattern(call.args[0]), _flags(call), "search")
    for name, (call, pattern, flags) in compiled.items():
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name]
        for use in sorted({USES[node.attr] for node in used if node.attr in USES} or {"search"}):
            yield Expression(file, call.lineno, name, pattern, flags, use)


def _re_function(call: ast.Call) -> str | None:
    function = call.func
    is_re = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "re"
    return function.attr if is_re and isinstance(function, ast.Attribute) else None


def _pattern(node: ast.expr) -> str:
    """The text of a pattern; a value inserted into an f-string counts as one letter."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
    raise AssertionError(f"{ast.unparse(node)}: write regular expressions as literals, so that this test can judge them")


def _flags(call: ast.Call) -> int:
    """The flags named anywhere in the call."""
    names = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
    return sum(int(getattr(re, name)) for name in names & {"VERBOSE", "DOTALL", "IGNORECASE", "MULTILINE", "ASCII"})


def test_no_expression_takes_more_than_linear_time() -> None:
    slow = [
        f"{one.file}:{one.line} {one.name} ({one.use}): {text!r} repeated"
        for one in expressions()
        if (one.file, one.name) not in NOT_READ_WITH and (text := superlinear_text(one.pattern, one.flags, one.use)) is not None
    ]
    assert not slow, "\n".join(slow)


def test_what_is_left_out_is_there() -> None:
    known = {(one.file, one.name) for one in expressions()}
    assert set(NOT_READ_WITH) <= known


@pytest.mark.parametrize(
    ("pattern", "use"),
    [
        (r"\s*\bBREAK\b\s*", "search"),
        (r"<(\w+):([^>]+)>", "search"),
        (r"\s*\[[^\]]+\]\s*$", "search"),
        (r":\s*(\d+\.?\d*)\s*\)", "search"),
        (r"\w[\w \-/]+$", "search"),
        (r"data:[\w.+-]*/?[\w.+-]*;base64,", "match"),
        (r"(.*)<([^>]*)>$", "match"),
        (r"(a+)+b", "match"),
        (r"(a|aa)*b", "match"),
        (r"(?:ab?|a)*c", "match"),
        (r"[ab]*?a*c", "match"),
        (r"x*x*", "fullmatch"),
        (r"a*(?!b)", "search"),
    ],
)
def test_the_judge_knows_slow_ones(pattern: str, use: str) -> None:
    assert superlinear_text(pattern, 0, use) is not None


@pytest.mark.parametrize(
    ("pattern", "use"),
    [
        (r"\bBREAK\b", "search"),
        (r"<(\w+):", "search"),
        (r"[,\s]+", "search"),
        (r'"(?:\\.|[^\\"])+"', "match"),
        (r"\s*(\d+)\s*(?:x\s*(\d+)\s*)?", "fullmatch"),
    ],
)
def test_the_judge_knows_linear_ones(pattern: str, use: str) -> None:
    assert superlinear_text(pattern, 0, use) is None
