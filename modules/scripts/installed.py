"""Extensions: the folders in extensions-builtin/ and extensions/, which of them are enabled, and the orders in their metadata.ini.

Reads folders and git's files; loads none of their code (modules/scripts/loading.py does). Must not know the page.
"""

from __future__ import annotations

import configparser
import logging
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.app_config import SCRIPT_DIR, AppConfig
from modules.scripts.extension_order import OrderRule, order_by_rules
from modules.scripts.files import ScriptFile
from modules_forge.config import INSTEAD

log = logging.getLogger(__name__)

GIT_TIMEOUT_S = 10
_NAMES = re.compile(r"[,\s]+")

extensions: list[Extension] = []
"""All extensions found, enabled or not, built-in ones first."""
extension_paths: dict[str, Extension] = {}
"""Absolute folder -> extension."""
loaded_extensions: dict[str, Extension] = {}
"""Canonical name -> extension, for enabled ones."""


class ExtensionMetadata:
    """metadata.ini of an extension. `canonical_name` is its Name in there, else the folder name, in lower case."""

    filename = "metadata.ini"

    def __init__(self, path: str, canonical_name: str) -> None:
        self.config = configparser.ConfigParser(strict=False, interpolation=None)
        file = Path(path) / self.filename
        try:
            self.config.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            log.warning("%s cannot be read and is ignored: %s", file, error)
        self.canonical_name = self.config.get("Extension", "Name", fallback=canonical_name).strip().lower()
        self.requires = self.get_script_requirements("Requires", "Extension")

    def get_script_requirements(self, field: str, section: str, extra_section: str | None = None) -> list[str]:
        """The names listed under `field` in `section` (and in `extra_section`), in lower case."""
        texts = [self.config.get(name, field, fallback="") for name in (section, extra_section) if name]
        return self.parse_list(" ".join(texts))

    @staticmethod
    def parse_list(text: str | None) -> list[str]:
        """Names separated by commas or spaces, in lower case."""
        return [name for name in _NAMES.split((text or "").strip().lower()) if name]

    def list_callback_order_instructions(self) -> Iterator[OrderRule]:
        """The order rules in the `[callbacks/NAME]` sections."""
        for section in self.config.sections():
            if section.lower().startswith("callbacks/"):
                name = section.split("/", 1)[1].lower()
                yield from self.rules_for(name, section)

    def rules_for(self, name: str, section: str, extra_section: str | None = None) -> Iterator[OrderRule]:
        """Before, After and Requires in `section`, as rules about `name`."""
        for other in self.get_script_requirements("Before", section, extra_section):
            yield OrderRule(first=name, then=other)
        for field in ("After", "Requires"):
            for other in self.get_script_requirements(field, section, extra_section):
                yield OrderRule(first=other, then=name)


class Extension:
    """One extension folder. Information from git is read on first use."""

    cached_fields = ("remote", "commit_date", "branch", "commit_hash", "version")

    def __init__(self, name: str, path: str, enabled: bool = True, is_builtin: bool = False, metadata: ExtensionMetadata | None = None) -> None:
        self.name = name
        self.path = path
        self.enabled = enabled
        self.is_builtin = is_builtin
        self.status = ""
        self.can_update = False
        self.commit_hash = ""
        self.commit_date: int | None = None
        self.version = ""
        self.branch: str | None = None
        self.remote: str | None = None
        self.have_info_from_repo = False
        self.metadata = metadata or ExtensionMetadata(path, name.lower())
        self.canonical_name = self.metadata.canonical_name

    def to_dict(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.cached_fields}

    def read_info_from_repo(self) -> None:
        """Remote, branch, commit and commit date, if the folder is a git clone and git is installed."""
        if self.have_info_from_repo:
            return
        self.have_info_from_repo = True
        if self.is_builtin or not (Path(self.path) / ".git").exists():
            return
        self.remote = self._git("config", "--get", "remote.origin.url")
        self.branch = self._git("rev-parse", "--abbrev-ref", "HEAD")
        commit = self._git("log", "-1", "--format=%H %ct")
        words = (commit or "").split()
        if len(words) == 2 and words[1].isascii() and words[1].isdecimal():  # the user's git settings may add output
            self.commit_hash, self.commit_date, self.version = words[0], int(words[1]), words[0][:8]

    def _git(self, *arguments: str) -> str | None:
        folder = str(Path(self.path).resolve())
        command = ["git", "-c", f"safe.directory={folder}", "-C", folder, *arguments]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            log.debug("git in %s: %s", folder, error)
            return None
        return result.stdout.strip() or None if result.returncode == 0 else None

    def list_files(self, subdir: str, extension: str) -> list[ScriptFile]:
        """Files in the folder `subdir` whose names end with `extension`, sorted."""
        folder = Path(self.path) / subdir
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return [ScriptFile(self.path, file.name, str(file)) for file in found if file.is_file() and file.suffix.lower() == extension]


def switches(options: Any, flags: Mapping[str, Any]) -> tuple[frozenset[str], str]:
    """(disabled names, disabled kinds: "none", "extra" or "all") from settings and flags; flags win."""
    which = str(options.disable_all_extensions)
    if flags.get("disable_all_extensions"):
        which = "all"
    elif flags.get("disable_extra_extensions") and which != "all":
        which = "extra"
    return frozenset(str(name) for name in options.disabled_extensions or []), which


def list_extensions(config: AppConfig, options: Any, *, builtin_dir: Path = SCRIPT_DIR / "extensions-builtin") -> list[Extension]:
    """Find all extensions, decide which are enabled, and order them by their metadata. Logs which are skipped and why."""
    disabled, which = switches(options, config.flags)
    found = [*_found_in(builtin_dir, is_builtin=True), *_found_in(config.extensions_dir, is_builtin=False)]
    _drop_duplicates(found)
    for extension in found:
        is_off_by_kind = which == "all" or (which == "extra" and not extension.is_builtin)
        extension.enabled = not is_off_by_kind and extension.name not in disabled
        if extension.enabled and not extension.is_builtin and extension.name.lower() in INSTEAD:
            log.info("Extension %s is not loaded: %s.", extension.name, INSTEAD[extension.name.lower()])
            extension.enabled, extension.status = False, INSTEAD[extension.name.lower()]
    if which != "none" and any(not extension.is_builtin for extension in found):
        by = "setting disable_all_extensions" if which == options.disable_all_extensions else f"flag --disable-{which}-extensions"
        log.info("Extensions are disabled (%s): %s.", which, by)
    extensions[:] = _in_order(found)
    extension_paths.clear()
    extension_paths.update({str(Path(extension.path).absolute()): extension for extension in extensions})
    loaded_extensions.clear()
    loaded_extensions.update({extension.canonical_name: extension for extension in active()})
    _report_missing_requirements()
    return list(extensions)


def active() -> list[Extension]:
    """The enabled extensions."""
    return [extension for extension in extensions if extension.enabled]


def find_extension(filename: str) -> Extension | None:
    """The extension that contains the file."""
    for folder in Path(filename).absolute().parents:
        if (extension := extension_paths.get(str(folder))) is not None:
            return extension
    return None


def forget() -> None:
    """Forget all listed extensions."""
    extensions.clear()
    extension_paths.clear()
    loaded_extensions.clear()


def _found_in(folder: Path, *, is_builtin: bool) -> list[Extension]:
    paths = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))) if folder.is_dir() else []
    return [Extension(path.name, str(path), is_builtin=is_builtin) for path in paths]


def _drop_duplicates(found: list[Extension]) -> None:
    first: dict[str, Extension] = {}
    for extension in list(found):
        other = first.setdefault(extension.canonical_name, extension)
        if other is not extension:
            log.warning("Extension %s has the name %r, like %s; it is ignored.", extension.path, extension.canonical_name, other.path)
            found.remove(extension)


def _in_order(found: Sequence[Extension]) -> list[Extension]:
    by_name = {extension.canonical_name: extension for extension in found}
    rules = [rule for extension in found for rule in extension.metadata.rules_for(extension.canonical_name, "Extension")]
    return [by_name[name] for name in order_by_rules(list(by_name), rules)]


def _report_missing_requirements() -> None:
    for extension in active():
        for name in extension.metadata.requires:
            if name not in loaded_extensions:
                state = "is disabled" if any(other.canonical_name == name for other in extensions) else "is not installed"
                log.warning("Extension %s requires %s, which %s.", extension.name, name, state)
