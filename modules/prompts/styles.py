"""Saved prompt styles: named prompt fragments that are inserted into a request, and recognized in the prompt of an infotext.

Stored in CSV files (modules/prompts/styles_file.py). `{prompt}` in a style marks where the user's text goes; without it, the style is
appended after a comma. Must not know the page or a running job.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from modules.errors import RequestError
from modules.prompts.styles_file import StylesFile, StylesFileError, parse_styles_file
from modules.settings.options import write_text_atomically

__all__ = ["PromptStyle", "StyleDatabase", "StylesFileError", "apply_styles_to_prompt", "merge_prompts", "read_styles"]

log = logging.getLogger(__name__)

PLACEHOLDER = "{prompt}"
MAX_STYLED_CHARS = 1_000_000
"""Longer results are rejected: a style containing `{prompt}` twice doubles the prompt each time it is chosen."""


class PromptStyle(NamedTuple):
    """`path` is the file that contains the style."""

    name: str
    prompt: str | None
    negative_prompt: str | None
    path: str | None = None


def apply_style(prompt: str, style_text: str | None) -> str:
    """`prompt` with one style applied. Raises RequestError if the result is too long."""
    text = style_text or ""
    if len(text) + text.count(PLACEHOLDER) * len(prompt) > MAX_STYLED_CHARS:
        raise RequestError(f"styles: they make the prompt longer than {MAX_STYLED_CHARS:,} characters. Choose fewer styles.")
    if PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, prompt)
    return ", ".join(part for part in (prompt.strip(), text.strip()) if part)


def merge_prompts(style_prompt: str, prompt: str) -> str:
    """apply_style with swapped arguments, under the name that extensions import."""
    return apply_style(prompt, style_prompt)


def apply_styles_to_prompt(prompt: str, styles: Iterable[str | None]) -> str:
    """`prompt` with several styles applied in order."""
    for style_text in styles:
        prompt = apply_style(prompt, style_text)
    return prompt


def remove_style(prompt: str, style_text: str | None) -> str | None:
    """`prompt` before `style_text` was applied; None if the style is not in it. An empty style is in every prompt."""
    text = (style_text or "").strip()
    if not text:
        return prompt
    if PLACEHOLDER in text:
        before, _, after = text.partition(PLACEHOLDER)
        fits = PLACEHOLDER not in after and len(prompt) >= len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after)
        return prompt[len(before) : len(prompt) - len(after)] if fits else None
    if prompt.strip() == text:
        return ""
    return prompt.strip().removesuffix(f", {text}") if prompt.strip().endswith(f", {text}") else None


class StyleDatabase:
    """The styles of several files, by name; a later file overrides an earlier one. Thread-safe.

    The last part of a path may contain `*`. New styles go to the first path without one.
    """

    def __init__(self, paths: Iterable[str | Path] | str | Path) -> None:
        self.paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
        self.default_path = next((path for path in self.paths if "*" not in path.name), Path("styles.csv"))
        self.no_style = PromptStyle("None", "", "", None)
        self.styles: dict[str, PromptStyle] = {}
        self._kept_names: set[str] = set()
        self._lock = threading.RLock()
        self.reload()

    def reload(self) -> None:
        """Read the files again."""
        styles = {style.name: style for path in self.get_style_paths() for style in read_styles(path)}
        with self._lock:
            self.styles = styles
            self._kept_names = set(styles)

    def get_style_paths(self) -> list[Path]:
        """The files that exist now, in reading order."""
        found = [sorted(path.parent.glob(path.name)) if "*" in path.name else [path] for path in self.paths]
        return list(dict.fromkeys(path for paths in found for path in paths))

    def names(self) -> list[str]:
        with self._lock:
            return list(self.styles)

    def _get(self, name: str) -> PromptStyle:
        return self.styles.get(name, self.no_style)

    def get_style_prompts(self, styles: Sequence[str]) -> list[str | None]:
        return [self._get(name).prompt for name in styles]

    def get_negative_style_prompts(self, styles: Sequence[str]) -> list[str | None]:
        return [self._get(name).negative_prompt for name in styles]

    def apply_styles_to_prompt(self, prompt: str, styles: Sequence[str]) -> str:
        """`prompt` with the named styles applied in order; unknown names are ignored."""
        return apply_styles_to_prompt(prompt, self.get_style_prompts(styles))

    def apply_negative_styles_to_prompt(self, prompt: str, styles: Sequence[str]) -> str:
        return apply_styles_to_prompt(prompt, self.get_negative_style_prompts(styles))

    def extract_styles_from_prompt(self, prompt: str, negative_prompt: str) -> tuple[list[str], str, str]:
        """(names, prompt, negative prompt): styles found in both texts, and the texts without them."""
        found: list[str] = []
        with self._lock:
            candidates = sorted(self.styles.values(), key=lambda style: -len(f"{style.prompt or ''}{style.negative_prompt or ''}"))
        while (hit := _first_hit(prompt, negative_prompt, [style for style in candidates if style.name not in found])) is not None:
            name, prompt, negative_prompt = hit
            found.append(name)
        return found[::-1], prompt, negative_prompt

    def save_style(self, style: PromptStyle) -> None:
        """Add or replace a style and write its file.

        Raises:
            StylesFileError: the file is not a valid styles file; nothing is changed.
        """
        with self._lock:
            old = self.styles.get(style.name)
            path = style.path or (old.path if old else None) or str(self.default_path)
            self._write({**self.styles, style.name: style._replace(path=path)}, Path(path))

    def delete_style(self, name: str) -> None:
        """Delete a style and write its file; does nothing for an unknown name. Raises StylesFileError like save_style."""
        with self._lock:
            old = self.styles.get(name)
            if old is not None:
                self._write({key: style for key, style in self.styles.items() if key != name}, Path(old.path) if old.path else None)

    def save_styles(self, path: str | Path | None = None) -> None:
        """Write `styles` in its current state, which extensions may have changed: each style to its file, or those without one to `path`."""
        with self._lock:
            default = str(path or self.default_path)
            styles = {name: style if style.path else style._replace(path=default) for name, style in self.styles.items()}
            for written in dict.fromkeys(style.path for style in styles.values()):
                self._write(styles, Path(str(written)))

    def _write(self, styles: dict[str, PromptStyle], path: Path | None) -> None:
        """Make `styles` the known ones and write one file; its previous content goes to a .bak file next to it."""
        if path is not None:
            file = _parse_styles(path) if path.is_file() else StylesFile(path)
            if file.unclear:
                raise StylesFileError(f"Styles file {path} is not written: {file.unclear[0]}. Put quotes around fields that contain the delimiter.")
            own = {style.name: (style.prompt or "", style.negative_prompt or "") for style in styles.values() if style.path == str(path)}
            file.update(own, self._kept_names - set(styles))
            if path.is_file():
                write_text_atomically(path.with_name(path.name + ".bak"), _read_text(path))
            write_text_atomically(path, "\ufeff" + file.text())
        self.styles = styles
        self._kept_names = set(styles)


def _first_hit(prompt: str, negative_prompt: str, styles: Iterable[PromptStyle]) -> tuple[str, str, str] | None:
    for style in styles:
        if {(style.prompt or "").strip(), (style.negative_prompt or "").strip()} <= {"", PLACEHOLDER}:
            continue  # an empty style cannot be recognized
        rest, negative_rest = remove_style(prompt, style.prompt), remove_style(negative_prompt, style.negative_prompt)
        if rest is not None and negative_rest is not None:
            return style.name, rest, negative_rest
    return None


def read_styles(path: Path) -> list[PromptStyle]:
    """The styles in one file; [] if it does not exist or is not a styles file (logged)."""
    if not path.is_file():
        return []
    try:
        file = _parse_styles(path)
    except StylesFileError as error:
        log.warning("%s Its styles are ignored.", error)
        return []
    for complaint in file.unclear:
        log.warning("Styles file %s: %s. It will not be written until that is fixed.", path, complaint)
    return [PromptStyle(*style, str(path)) for style in file.styles()]


def _parse_styles(path: Path) -> StylesFile:
    return parse_styles_file(path, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StylesFileError(f"Styles file {path} cannot be read ({error}). Save it as UTF-8 text, or move it away.") from error
