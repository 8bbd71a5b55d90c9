"""Localization files, tables of English texts and translations: `localizations/NAME.json` (--localizations-dir), also in extensions."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from backend.foreign_json import read_json_file

log = logging.getLogger(__name__)

NONE = "None"
MAX_BYTES = 8 << 20


def find_localizations(folders: Iterable[Path]) -> dict[str, Path]:
    """The files by name; of two with the same name the first counts."""
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            for file in sorted(folder.glob("*.json")):
                found.setdefault(file.stem, file)
    return found


def read_localization(file: Path) -> dict[str, str]:
    """The table; empty, with the reason in the log, for a file that has none. Entries that are no texts are left out."""
    try:
        table = read_json_file(file, max_bytes=MAX_BYTES)
    except (OSError, ValueError) as error:
        log.error("Localization %s cannot be read (%s); the page is in English.", file, error)
        return {}
    if not isinstance(table, dict):
        log.error("Localization %s is not a table of texts; the page is in English.", file)
        return {}
    return {str(text): translation for text, translation in table.items() if isinstance(translation, str) and translation}
