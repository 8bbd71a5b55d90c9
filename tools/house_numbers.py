"""Counts facts about the sources of one or several trees: `python -m tools.house_numbers BEFORE AFTER` prints a Markdown table.

A tree is a folder with a checkout; `git worktree add --detach /tmp/before COMMIT` creates one. tools/suite_time.py has the times.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.contract.sources import PACKAGES, Source, find_cycles, product_sources, read_imports

MOST_FOLDERS = 12


class Longest(NamedTuple):
    """The longest of its kind."""

    num_lines: int
    name: str

    def __str__(self) -> str:
        return f"{self.num_lines} lines ({self.name})"


class HouseNumbers(NamedTuple):
    """Counts of one tree. `folders`: Python files directly in each folder of the product. `cycles`: number of modules in each import cycle."""

    num_files: int
    num_lines: int
    num_test_lines: int
    folders: Counter[str]
    largest_file: Longest
    largest_function: Longest
    cycles: tuple[int, ...]
    num_mentions: int
    num_mentioning: int


def count_house(root: Path, word: str = "current_application") -> HouseNumbers:
    """The numbers of a tree. `word` is counted by lines, and by files with such a line, in modules/ and the built-in extensions."""
    sources = product_sources(root.resolve())
    guests = [source for source in sources if source.top in ("modules", "extensions-builtin")]
    mentions = Counter({source.name: sum(word in line for line in source.text.splitlines()) for source in guests})
    tests = (path.read_text(encoding="utf-8") for path in sorted((root / "tests").rglob("*.py")))
    return HouseNumbers(
        num_files=len(sources),
        num_lines=sum(_num_lines(source) for source in sources),
        num_test_lines=sum(len(text.splitlines()) for text in tests),
        folders=Counter(source.path.parent.as_posix() for source in sources),
        largest_file=max(Longest(_num_lines(source), source.name) for source in sources),
        largest_function=max(longest for source in sources for longest in _functions(source)),
        cycles=tuple(sorted((len(cycle) for cycle in find_cycles(read_imports(sources))), reverse=True)),
        num_mentions=mentions.total(),
        num_mentioning=len(+mentions),
    )


def _num_lines(source: Source) -> int:
    return len(source.text.splitlines())


def _functions(source: Source) -> list[Longest]:
    nodes = [node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [Longest((node.end_lineno or node.lineno) - node.lineno + 1, f"{source.name}: {node.name}") for node in nodes]


def report(trees: Sequence[HouseNumbers]) -> list[str]:
    """A Markdown table with one column per tree."""
    rows = [
        ("Python files of the product", [str(tree.num_files) for tree in trees]),
        ("lines of them", [str(tree.num_lines) for tree in trees]),
        ("lines of tests", [str(tree.num_test_lines) for tree in trees]),
        ("largest file", [str(tree.largest_file) for tree in trees]),
        ("largest function", [str(tree.largest_function) for tree in trees]),
        ("import cycles, those inside functions too", [_cycles_text(tree.cycles) for tree in trees]),
        ("lines that mention current_application", [f"{tree.num_mentions} in {tree.num_mentioning} files" for tree in trees]),
    ]
    most: Counter[str] = Counter()
    for tree in trees:
        most |= tree.folders
    rows += [(f"files directly in {name}", [str(tree.folders[name]) for tree in trees]) for name, _ in most.most_common(MOST_FOLDERS)]
    titles = ("before", "after") if len(trees) == 2 else [f"tree {number}" for number in range(1, len(trees) + 1)]
    return [f"| | {' | '.join(titles)} |", "|---|" + "---|" * len(trees), *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]


def _cycles_text(sizes: Sequence[int]) -> str:
    return f"{len(sizes)}, the largest of {sizes[0]} files" if sizes else "0"


if __name__ == "__main__":
    folders = [Path(word) for word in sys.argv[1:]] or [Path()]
    for folder in folders:
        if not any((folder / package).is_dir() for package in PACKAGES):
            sys.exit(f"{folder}: has none of {', '.join(PACKAGES)}; give folders with a checkout of this repository.")
    print("\n".join(report([count_house(folder) for folder in folders])))
