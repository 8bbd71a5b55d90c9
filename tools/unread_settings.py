"""`python -m tools.unread_settings`: settings that no code reads, with the messages of modules/settings/inert.py about them.

A setting counts as read if its name occurs in the sources outside its own entry, literally or as a pattern with parts filled in.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from modules.settings.presets import NAMES
from tools.documents import write_measured

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modules", "modules_forge", "backend", "extensions-builtin", "javascript", "scripts")
OWN_FILES = {"settings/table.py", "settings/page_table.py", "settings/inert.py"}
READ_BY_PRESET = re.compile(rf"({'|'.join(NAMES)})_(t2i|i2i)_(width|height|cfg|d_cfg|sampler|scheduler|step)")
"""Settings whose names a preset assembles from three parts."""
_PATTERN = re.compile(r"""f["']((?:[a-z0-9_]|\{[^{}"']+\})+)["']""")


def source_files(root: Path = ROOT) -> list[Path]:
    """Python and JavaScript files that may read settings."""
    found = [path for folder in FOLDERS for suffix in ("*.py", "*.js") for path in (root / folder).rglob(suffix)]
    return sorted({*found, *root.glob("*.py")} - {path for path in found if f"{path.parent.name}/{path.name}" in OWN_FILES})


def find_unread(keys: Iterable[str], sources: Iterable[str]) -> list[str]:
    """The keys that occur in none of the sources."""
    texts = list(sources)
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    patterns = [_as_regex(found) for text in texts for found in _PATTERN.findall(text) if "{" in found and _says_enough(found)]
    patterns.append(READ_BY_PRESET)
    return [key for key in keys if key not in words and not any(pattern.fullmatch(key) for pattern in patterns)]


def _says_enough(pattern: str) -> bool:
    """Whether a pattern is more than placeholders; otherwise it would match any setting."""
    return len(re.sub(r"\{[^{}]*\}|_", "", pattern)) >= 5


def _as_regex(pattern: str) -> re.Pattern[str]:
    return re.compile(r"\w+".join(re.escape(part) for part in re.split(r"\{[^{}]+\}", pattern)))


def unread_settings(root: Path = ROOT) -> list[str]:
    """Settings of the built-in table that nothing reads."""
    from modules.settings.table import build_option_table

    keys = [key for key, info in build_option_table({}).items() if not getattr(info, "do_not_save", False)]
    return find_unread(keys, (path.read_text(encoding="utf-8") for path in source_files(root)))


def effectless_tables() -> list[str]:
    """Every flag and setting accepted without effect, with what happens instead, as Markdown."""
    from modules.launch.cmd_args import NO_EFFECT, NOT_YET
    from modules.settings.inert import BY_DESIGN, NOT_READ

    parts = {
        "Flags of features that do not exist yet": [(f"`{flag}`", truth) for flag, truth in NOT_YET.items()],
        "Flags that have no effect by design": [(f"`{flag}`", truth) for flag, (_, truth) in NO_EFFECT.items()],
        "Settings that nothing reads yet": [(", ".join(f"`{key}`" for key in keys.split()), truth) for truth, keys in NOT_READ.items()],
        "Settings that have no effect by design": [(f"`{key}`", truth) for key, truth in BY_DESIGN.items()],
    }
    lines: list[str] = []
    for title, rows in parts.items():
        lines += ["", f"### {title}", "", "| name | instead |", "|---|---|", *(f"| {names} | {truth} |" for names, truth in rows)]
    return lines[1:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.unread_settings", description=__doc__)
    parser.add_argument("--write", action="store_true", help="also update the tables in docs/compatibility.md")
    from modules.settings.inert import WHAT_IS_TRUE

    for key in unread_settings():
        print(f"{key}: {WHAT_IS_TRUE.get(key, 'NOT EXPLAINED')}")
    if parser.parse_args().write:
        write_measured(ROOT / "docs" / "compatibility.md", effectless_tables(), command="tools.unread_settings --write")


if __name__ == "__main__":
    main()
