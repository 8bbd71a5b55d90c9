"""Saved prompt styles: named pieces of prompt that are put into a request, and found again in the prompt of an infotext.

Kept in CSV files with the columns name, prompt, negative_prompt. `{prompt}` in a style marks where the user's own text goes; without it the
style is added behind a comma. Must not know the page or a running job.
"""

from __future__ import annotations

import csv
import io
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from modules.options import write_text_atomically

log = logging.getLogger(__name__)

COLUMNS = ("name", "prompt", "negative_prompt")
PLACEHOLDER = "{prompt}"


class PromptStyle(NamedTuple):
    """`path` is the file that holds the style."""

    name: str
    prompt: str | None
    negative_prompt: str | None
    path: str | None = None


def apply_style(prompt: str, style_text: str | None) -> str:
    """`prompt` with one style's text."""
    text = style_text or ""
    if PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, prompt)
    return ", ".join(part for part in (prompt.strip(), text.strip()) if part)


def merge_prompts(style_prompt: str, prompt: str) -> str:
    """apply_style under the name that extensions import, arguments the other way round."""
    return apply_style(prompt, style_prompt)


def remove_style(prompt: str, style_text: str | None) -> str | None:
    """`prompt` as it was before `style_text` was applied; None when the style is not in it. An empty style is in every prompt."""
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
    """The styles of some files, by name; a later file's style replaces an earlier one's of the same name. New styles go to the first file. Thread-safe."""

    def __init__(self, paths: Iterable[str | Path] | str | Path) -> None:
        self.paths = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
        self.no_style = PromptStyle("None", "", "", None)
        self.styles: dict[str, PromptStyle] = {}
        self._lock = threading.RLock()
        self.reload()

    def reload(self) -> None:
        """Read the files again."""
        styles = {style.name: style for path in self.paths for style in read_styles(path)}
        with self._lock:
            self.styles = styles

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
        """`prompt` with the styles of these names in their order; unknown names change nothing."""
        for text in self.get_style_prompts(styles):
            prompt = apply_style(prompt, text)
        return prompt

    def apply_negative_styles_to_prompt(self, prompt: str, styles: Sequence[str]) -> str:
        for text in self.get_negative_style_prompts(styles):
            prompt = apply_style(prompt, text)
        return prompt

    def extract_styles_from_prompt(self, prompt: str, negative_prompt: str) -> tuple[list[str], str, str]:
        """(names, prompt, negative prompt): the styles that are in both texts, and the texts without them."""
        found: list[str] = []
        with self._lock:
            candidates = sorted(self.styles.values(), key=lambda style: -len(f"{style.prompt or ''}{style.negative_prompt or ''}"))
        while (hit := _first_hit(prompt, negative_prompt, [style for style in candidates if style.name not in found])) is not None:
            name, prompt, negative_prompt = hit
            found.append(name)
        return found[::-1], prompt, negative_prompt

    def save_style(self, style: PromptStyle) -> None:
        """Add or replace a style and write its file."""
        with self._lock:
            old = self.styles.get(style.name)
            path = style.path or (old.path if old else None) or str(self.paths[0])
            self.styles[style.name] = style._replace(path=path)
            self._write(Path(path))

    def delete_style(self, name: str) -> None:
        """Forget a style and write its file; nothing for an unknown name."""
        with self._lock:
            old = self.styles.pop(name, None)
            if old is not None and old.path:
                self._write(Path(old.path))

    def _write(self, path: Path) -> None:
        if path.is_file():
            write_text_atomically(path.with_name(path.name + ".bak"), path.read_text(encoding="utf-8-sig"))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((style.name, style.prompt or "", style.negative_prompt or "") for style in self.styles.values() if style.path == str(path))
        write_text_atomically(path, "\ufeff" + text.getvalue())


def _first_hit(prompt: str, negative_prompt: str, styles: Iterable[PromptStyle]) -> tuple[str, str, str] | None:
    for style in styles:
        if not (style.prompt or style.negative_prompt):
            continue
        rest, negative_rest = remove_style(prompt, style.prompt), remove_style(negative_prompt, style.negative_prompt)
        if rest is not None and negative_rest is not None:
            return style.name, rest, negative_rest
    return None


def read_styles(path: Path) -> list[PromptStyle]:
    """The styles of one file; [] when it is not there or is no such file (which is logged)."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        log.warning("Styles file %s cannot be read (%s); its styles are left out.", path, error)
        return []
    return [PromptStyle(name, row.get("prompt") or row.get("text") or "", row.get("negative_prompt") or "", str(path)) for row in rows if (name := row.get("name"))]
