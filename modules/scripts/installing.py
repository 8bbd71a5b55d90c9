"""Installs, updates and restores extensions with git. Each function says what it did, or raises RequestError with what git said.

Code of an extension is run at the next start, not here. Must not know the page.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backend.foreign_json import parse_json, read_file, read_json_file
from backend.unfinished_files import unfinished_name
from modules.errors import RequestError
from modules.scripts.installed import Extension
from modules.settings.options import write_text_atomically

log = logging.getLogger(__name__)

CLONE_TIMEOUT_S, FETCH_TIMEOUT_S, QUICK_TIMEOUT_S = 600, 60, 20
INDEX_TIMEOUT_S = 15
MAX_INDEX_BYTES = 8 << 20
MAX_LISTED = 2000
SCHEMES = ("https", "http")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,99}")
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETTINGS = ("protocol.ext.allow=never", "core.hooksPath=/dev/null", "core.fsmonitor=false", "core.askPass=true", "credential.interactive=never")
"""A folder that a user names may have settings that run programs; these are off. Nobody is there to be asked for a password."""


def run_git(folder: Path, *arguments: str, timeout_s: float = QUICK_TIMEOUT_S) -> str:
    """What git prints. Raises: RequestError with its message; it never waits for a password."""
    settings = [part for setting in (*_SETTINGS, f"safe.directory={folder.resolve()}") for part in ("-c", setting)]
    try:
        done = subprocess.run(
            ["git", *settings, "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise RequestError("git is not installed on the server. Install it, or copy the extension's folder into the extensions folder.") from error
    except subprocess.TimeoutExpired as error:
        raise RequestError(f"git {arguments[0]} has not finished after {timeout_s:.0f} s. Is the server connected to the internet?") from error
    if done.returncode:
        lines = [line.removeprefix("fatal: ") for line in done.stderr.strip().splitlines() if line.strip()]
        raise RequestError(f"git {arguments[0]} failed: {lines[-1][:300] if lines else f'exit status {done.returncode}'}")
    return done.stdout.strip()


def install(source: str, extensions_dir: Path, *, name: str = "", branch: str = "") -> Path:
    """Clone the repository at the address `source`, or copy the folder `source` of the server; returns the new folder. Raises: RequestError."""
    source = source.strip()
    is_folder = bool(source) and urlsplit(source).scheme.lower() not in (*SCHEMES, "git", "ssh", "ext", "file")
    if not is_folder and urlsplit(source).scheme.lower() not in SCHEMES:
        raise RequestError(f"{source[:200]!r}: give an address that begins with https://, or a folder on the server.")
    target = extensions_dir / _new_name(name or re.split(r"[\\/]", source.rstrip("/\\"))[-1].removesuffix(".git"))
    if target.exists():
        raise RequestError(f"{target} exists already. Update that extension, or remove its folder first.")
    extensions_dir.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(target)
    try:
        if is_folder:
            _copy_folder(Path(source), unfinished, extensions_dir)
        else:
            _clone(source, unfinished, branch.strip())
        if target.exists():
            raise RequestError(f"{target} exists by now.")
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("Extension %s was installed from %s; it counts after a restart.", target.name, source)
    return target


def _new_name(name: str) -> str:
    if not _NAME.fullmatch(name) or name.endswith((".", " ")):
        raise RequestError(f"{name[:100]!r} cannot be the name of an extension's folder: use letters, digits, - _ . and spaces.")
    return name


def _clone(source: str, target: Path, branch: str) -> None:
    if branch and not _BRANCH.fullmatch(branch):
        raise RequestError(f"{branch[:100]!r} is no name of a branch.")
    chosen = ["--branch", branch] if branch else []
    run_git(target.parent, "clone", "--filter=blob:none", *chosen, "--", source, str(target), timeout_s=CLONE_TIMEOUT_S)


def _copy_folder(source: Path, target: Path, extensions_dir: Path) -> None:
    if not source.is_absolute() or not source.is_dir():
        raise RequestError(f"{str(source)[:200]!r} is no folder of the server. Give its whole path, or an address that begins with https://.")
    if extensions_dir.resolve().is_relative_to(source.resolve()):
        raise RequestError(f"{source} contains the extensions folder itself.")
    try:
        shutil.copytree(source, target, symlinks=True)
    except (OSError, shutil.Error) as error:
        raise RequestError(f"{source} could not be copied: {str(error)[:300]}") from error


def is_clone(extension: Extension) -> bool:
    return not extension.is_builtin and (Path(extension.path) / ".git").exists()


def check_update(extension: Extension) -> str:
    """Ask the extension's repository what is new; also kept as the extension's `status` and `can_update`. Raises: RequestError."""
    folder = Path(extension.path)
    run_git(folder, "fetch", "--quiet", timeout_s=FETCH_TIMEOUT_S)
    behind = run_git(folder, "rev-list", "--count", "HEAD..@{upstream}")
    extension.can_update = behind not in ("", "0")
    extension.status = f"{behind} new commits" if extension.can_update else "latest"
    return extension.status


def update(extension: Extension) -> str:
    """Bring the extension to its repository's state. Raises: RequestError, and nothing is changed, where files were changed here."""
    folder = Path(extension.path)
    run_git(folder, "fetch", "--quiet", timeout_s=FETCH_TIMEOUT_S)
    before = run_git(folder, "rev-parse", "HEAD")
    run_git(folder, "merge", "--ff-only", "@{upstream}", timeout_s=FETCH_TIMEOUT_S)
    after = run_git(folder, "rev-parse", "HEAD")
    extension.have_info_from_repo = extension.can_update = False
    return "latest" if before == after else f"updated from {before[:8]} to {after[:8]}"


# what is available


@dataclass(frozen=True, kw_only=True, slots=True)
class Available:
    """An entry of an index: texts of strangers."""

    name: str
    url: str
    description: str
    tags: tuple[str, ...]
    added: str


def read_index(source: str, data_dir: Path) -> list[Available]:
    """The extensions that an index names: an address of a JSON file, or the name of one in the data folder. Raises: RequestError."""
    source = source.strip()
    if urlsplit(source).scheme.lower() in SCHEMES:
        content = _download(source)
    else:
        file = (data_dir / source).resolve()
        if not source or not file.is_relative_to(data_dir.resolve()) or file.suffix.lower() != ".json" or not file.is_file():
            raise RequestError(f"{source[:200]!r}: give an address that begins with https://, or the name of a .json file in {data_dir}.")
        content = read_file(file, max_bytes=MAX_INDEX_BYTES)
    try:
        found = parse_json(content, max_bytes=MAX_INDEX_BYTES)
    except ValueError as error:
        raise RequestError(f"{source[:200]} is no index of extensions: {error}") from error
    entries = found.get("extensions") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise RequestError(f"{source[:200]} is no index of extensions: it has no list of that name.")
    return [one for entry in entries[:MAX_LISTED] if isinstance(entry, dict) and (one := _available(entry)) is not None]


def _available(entry: Mapping[str, Any]) -> Available | None:
    name, url = entry.get("name"), entry.get("url")
    if not isinstance(name, str) or not isinstance(url, str) or urlsplit(url).scheme.lower() not in SCHEMES:
        return None
    tags = entry.get("tags")
    return Available(
        name=name[:200], url=url[:500], description=str(entry.get("description") or "")[:1000], added=str(entry.get("added") or "")[:40],
        tags=tuple(str(tag)[:40] for tag in tags[:20]) if isinstance(tags, list) else (),
    )  # fmt: skip


def _download(url: str) -> bytes:
    import httpx  # only here

    content = b""
    try:
        with httpx.stream("GET", url, timeout=INDEX_TIMEOUT_S, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_INDEX_BYTES:
                    raise RequestError(f"{url} is larger than {MAX_INDEX_BYTES >> 20} MiB; it is no index of extensions.")
    except httpx.HTTPError as error:
        offline = "Without internet, put an index into the data folder and give its name."
        raise RequestError(f"{url} could not be read ({type(error).__name__}: {str(error)[:200]}). {offline}") from error
    return content


# states


def save_state(folder: Path, extensions: Iterable[Extension], disabled: Sequence[str], name: str) -> Path:
    """Write which extensions there are, at which commits, and which are off; returns the file. Raises: RequestError, OSError."""
    label = re.sub(r"[^A-Za-z0-9_-]+", "-", name.strip())[:60].strip("-")
    entries = {}
    for extension in extensions:
        if is_clone(extension):
            extension.read_info_from_repo()
            entries[extension.name] = {"remote": extension.remote, "branch": extension.branch, "commit_hash": extension.commit_hash}
        elif not extension.is_builtin:
            entries[extension.name] = {}
    state = {"created_at": time.time(), "name": name[:100], "extensions": entries, "disabled": list(disabled)}
    file = folder / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}{f'_{label}' if label else ''}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, json.dumps(state, indent=4))
    return file


def saved_states(folder: Path) -> list[str]:
    """Names of the saved states, the newest first."""
    return sorted((file.stem for file in folder.glob("*.json")), reverse=True) if folder.is_dir() else []


def restore_state(folder: Path, name: str, extensions: Iterable[Extension]) -> tuple[list[str], list[str]]:
    """Bring the clones to the commits of a saved state; returns (names that were off then, what was done). Raises: RequestError."""
    if name not in saved_states(folder):
        raise RequestError(f"{name[:100]!r} is no saved state.")
    try:
        state = read_json_file(folder / f"{name}.json")
    except (OSError, ValueError) as error:
        raise RequestError(f"{name}.json cannot be read: {error}") from error
    entries = state.get("extensions") if isinstance(state, dict) else None
    disabled = state.get("disabled") if isinstance(state, dict) else None
    if not isinstance(entries, dict) or not isinstance(disabled, list):
        raise RequestError(f"{name}.json is no saved state.")
    done = [_restore_one(extension, entries.get(extension.name)) for extension in extensions if is_clone(extension)]
    missing = [str(known)[:100] for known in entries.keys() - {extension.name for extension in extensions}]
    return [str(one) for one in disabled], [*filter(None, done), *(f"{known}: is not installed any more" for known in missing)]


def _restore_one(extension: Extension, entry: Any) -> str:
    wanted = entry.get("commit_hash") if isinstance(entry, dict) else None
    folder = Path(extension.path)
    if not isinstance(wanted, str) or not _COMMIT.fullmatch(wanted) or run_git(folder, "rev-parse", "HEAD") == wanted:
        return ""
    try:
        if run_git(folder, "status", "--porcelain", "--untracked-files=no"):
            raise RequestError("files were changed here")
        branch = entry.get("branch")
        if isinstance(branch, str) and _BRANCH.fullmatch(branch) and branch != "HEAD":
            run_git(folder, "checkout", "--quiet", "-B", branch, wanted, timeout_s=FETCH_TIMEOUT_S)
            run_git(folder, "branch", "--quiet", f"--set-upstream-to=origin/{branch}")
        else:
            run_git(folder, "checkout", "--quiet", "--detach", wanted, timeout_s=FETCH_TIMEOUT_S)
    except RequestError as error:
        return f"{extension.name}: stays ({error})"
    extension.have_info_from_repo = False
    return f"{extension.name}: now at {wanted[:8]}"
