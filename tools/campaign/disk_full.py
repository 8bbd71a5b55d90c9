"""A full disk under a running server: outputs, settings and caches are on a small tmpfs that is filled and emptied again.

Pictures are returned with a comment, settings are rejected, nothing is half-written, old files stay intact, and everything works again after.

python -m tools.campaign.disk_full
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import RequestError
from modules.prompts.styles import PromptStyle, StyleDatabase
from tools.campaign.full_server import FullServer, full_server, report
from tools.campaign.kills import faults_in, rests_in

SIZE_MIB = 16
BALLAST = "ballast"
CHUNK_BYTES = 4096
FORMATS = ("png", "jpg", "webp")


def reason_not_to_run() -> str | None:
    """Why no tmpfs can be mounted; None if it can."""
    if sys.platform != "linux":
        return f"tmpfs only exists on Linux; this is {sys.platform}"
    return None if os.geteuid() == 0 else "only root may mount a tmpfs; run it with sudo or in a container"


@contextlib.contextmanager
def small_disk(size_mib: int) -> Iterator[Path]:
    """A folder on a file system of this size. Raises CalledProcessError if mounting is not allowed."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", folder], check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave_bytes: int = 0) -> None:
    """Write until the disk is full, then free `leave_bytes`."""
    path = folder / BALLAST
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, CHUNK_BYTES, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    os.truncate(path, path.stat().st_size - leave_bytes)


def empty(folder: Path) -> None:
    (folder / BALLAST).unlink()


def digests(folder: Path) -> dict[str, str]:
    """Digests of all files below `folder`, except the filler."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != BALLAST]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Findings:
    """Table rows, and failures."""

    rows: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def check(self, what: str, said: object, *, holds: bool) -> None:
        self.rows.append(f"| {what} | {said} | {'yes' if holds else 'NO'} |")
        self.faults += [] if holds else [f"{what}: {said}"]


def status_of(ask: Callable[[], Any]) -> tuple[int, str]:
    """Status and text of an answer."""
    try:
        return 200, json.dumps(ask())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def comments_of(answer: dict[str, Any]) -> str:
    return str(json.loads(answer["info"]).get("comments", ""))


def _same(found: Findings, what: str, before: dict[str, str], disk: Path) -> None:
    """Check that old files are unchanged and nothing is half-written."""
    now = digests(disk)
    changed = sorted(name for name, digest in before.items() if now.get(name) != digest)
    half = [*faults_in(disk), *rests_in(disk)]
    found.check(what, f"{len(changed)} old files changed, {len(half)} half-written {[*changed, *half] or ''}".strip(), holds=not changed and not half)


def try_pictures(found: Findings, server: FullServer, disk: Path, what: str) -> None:
    """Save one picture of each kind; each must be returned, with a message if its file is missing."""
    for number, kind in enumerate(FORMATS):
        before = len([path for path in (disk / "outputs").rglob("*") if path.is_file() and path.suffix != ".txt"])
        overrides = {"samples_format": kind, "save_txt": True}
        answer = server.txt2img(save_images=True, seed=number, override_settings=overrides)
        after = len([path for path in (disk / "outputs").rglob("*") if path.is_file() and path.suffix != ".txt"])
        said = comments_of(answer).replace(f"{disk}/", "")
        is_said = "Not saved" in said or "Text file not saved" in said
        is_told = bool(answer["images"]) and (after > before or is_said)
        found.check(f"{what}: {kind}", f"{len(answer['images'])} picture, {after - before} new files, {said[:90]!r}", holds=is_told)


def try_settings(found: Findings, server: FullServer, what: str) -> None:
    """A change that cannot be saved must be rejected with the cause, and the old value must stay."""
    before = server.get("/sdapi/v1/options")["jpeg_quality"]
    status, text = status_of(lambda: server.post("/sdapi/v1/options", {"jpeg_quality": before - 1}))
    now = server.get("/sdapi/v1/options")["jpeg_quality"]
    found.check(f"{what}: settings", f"status {status}, value {before} -> {now}", holds=status == 507 and "full" in text and now == before)


def try_styles(found: Findings, disk: Path, what: str, *, fits: bool) -> None:
    """Test the styles file with the class used by the page's dialog."""
    styles = StyleDatabase(disk / "styles.csv")
    styles.reload()
    before = set(styles.styles)
    try:
        styles.save_style(PromptStyle(f"style {len(before)}", "x" * 20_000, ""))
        said = "saved"
    except (OSError, RequestError) as error:
        said = str(error)
    styles.reload()
    kept = set(styles.styles)
    found.check(f"{what}: styles", f"{said[:60]}, {len(before)} -> {len(kept)} styles", holds=(kept > before) if fits else kept == before)


def run(disk: Path, log_file: Path) -> Findings:
    """Fill the disk at `disk` under a running server, completely and almost, then empty it."""
    found = Findings()
    with full_server(disk, log_file) as server:
        server.txt2img(save_images=True)
        server.post("/sdapi/v1/options", {"jpeg_quality": 77})
        try_styles(found, disk, "with room", fits=True)
        for leave_bytes in (0, CHUNK_BYTES):
            what = "full" if not leave_bytes else f"{leave_bytes} bytes left"
            before = {name: digest for name, digest in digests(disk).items() if not name.startswith(("params.txt", "cache"))}
            fill(disk, leave_bytes)
            try_pictures(found, server, disk, what)
            if not leave_bytes:
                try_settings(found, server, what)
            try_styles(found, disk, what, fits=False)
            _same(found, f"{what}: files", before, disk)
            empty(disk)
        fill(disk)
        code = server.end()
        found.check("full: end by SIGTERM", f"exit code {code}", holds=code == 0)
    with full_server(disk, log_file) as server:
        found.check("full: start", server.get("/sdapi/v1/options")["jpeg_quality"], holds=server.get("/sdapi/v1/options")["jpeg_quality"] == 77)
        try_pictures(found, server, disk, "full after a start")
        empty(disk)
        answer = server.txt2img(save_images=True, seed=9)
        found.check("with room again: picture", comments_of(answer) or "saved", holds="ot saved" not in comments_of(answer))
        status, _ = status_of(lambda: server.post("/sdapi/v1/options", {"jpeg_quality": 66}))
        kept = json.loads((disk / "config.json").read_text(encoding="utf-8"))["jpeg_quality"]
        found.check("with room again: settings", f"status {status}, config.json has {kept}", holds=(status, kept) == (200, 66))
        try_styles(found, disk, "with room again", fits=True)
    _same(found, "at the end: files", {}, disk)
    text = log_file.read_text(errors="replace")
    found.check("log", f"{text.count('Traceback')} tracebacks", holds="Traceback" not in text)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=SIZE_MIB)
    given = parser.parse_args()
    if reason := reason_not_to_run():
        print(f"skipped because {reason}")
        return 0
    with tempfile.TemporaryDirectory() as logs:
        try:
            with small_disk(given.size_mib) as disk:
                found = run(disk, Path(logs) / "log.txt")
        except subprocess.CalledProcessError as error:
            print(f"skipped because the tmpfs could not be mounted: {error.stderr.decode(errors='replace').strip()}")
            return 0
        finally:
            log_file = Path(logs) / "log.txt"
            print(log_file.read_text(errors="replace")[-3000:] if log_file.exists() else "no log")
    command = f"python -m tools.campaign.disk_full --size-mib {given.size_mib}"
    rows = ["| What | Seen | As it must be |", "|---|---|---|", *found.rows]
    print(report("disk_full", "A full disk under outputs, settings and caches", command, rows))
    print("\n".join(found.faults) or "no faults")
    return 1 if found.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
