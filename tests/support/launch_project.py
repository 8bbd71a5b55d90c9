"""A copy of the launcher with a tiny program, tiny packages and no network, for tests that start it like a user."""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT_DIR = Path(__file__).resolve().parents[2]
# The interpreter behind the virtual environment that runs the tests.
BASE_PYTHON = str(Path(sys.base_prefix) / ("python.exe" if os.name == "nt" else f"bin/python{sys.version_info[0]}.{sys.version_info[1]}"))

WEBUI = """
import importlib.metadata, os, sys

def main(config):
    print("PROGRAM", config.listen_port, sys.prefix, os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
    if os.environ.get("PROGRAM_IMPORTS"):
        __import__(os.environ["PROGRAM_IMPORTS"])
    return int(os.environ.get("PROGRAM_CODE", "0"))

if os.environ.get("WEBUI_IMPORTS"):
    __import__(os.environ["WEBUI_IMPORTS"])
"""


def write_wheel(folder: Path, name: str, version: str, *, requires: Sequence[str] = (), source: str = "") -> Path:
    """A minimal wheel with one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": source or f"__version__ = {version!r}\n",
        f"{info}/METADATA": "\n".join(
            ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {what}" for what in requires), ""]
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    records = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in files.items()]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file_name, text in files.items():
            archive.writestr(file_name, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*records, f"{info}/RECORD,,", ""]))
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@dataclass
class Result:
    code: int
    output: str

    def lines(self, begin: str) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith(begin)]


@dataclass
class Project:
    """The copy at `root`, with wheels to install from in `wheels`."""

    root: Path
    wheels: Path
    python: str = BASE_PYTHON
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, *words: str, **variables: str) -> Result:
        """Run `python launch.py WORDS` in the copy."""
        return self.run_python("launch.py", *words, **variables)

    def run_python(self, *words: str, **variables: str) -> Result:
        pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
        environ = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT", "TEMP", "LANG") if name in os.environ},
            **pip,
            **self.variables,
            **variables,
        }
        environ = {name: value for name, value in environ.items() if value}
        result = subprocess.run(
            [self.python, *words], cwd=self.root, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600
        )
        return Result(result.returncode, result.stdout + result.stderr)

    def write_requirements(self, *lines: str) -> None:
        (self.root / "requirements_versions.txt").write_text("\n".join([*lines, ""]))

    @property
    def venv(self) -> Path:
        return self.root / "venv"


def make_project(folder: Path) -> Project:
    """launch.py, the modules it needs, a program that prints one line, and two packages: torch 2.13.0 and tiny 1.0."""
    root, wheels = folder / "a project", folder / "wheels"
    wheels.mkdir(parents=True)
    for path in _files_of_the_start():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT_DIR / path, root / path)
    (root / "webui.py").write_text(WEBUI)
    write_wheel(wheels, "torch", "2.13.0")
    write_wheel(wheels, "tiny", "1.0", requires=["torch>=1"])
    project = Project(root, wheels)
    project.write_requirements("# a list", "torch==2.13.0", "tiny==1.0  # the rest")
    return project


def _files_of_the_start() -> set[Path]:
    """launch.py and its imports, relative to the root. Imports inside functions belong to the program."""
    found: set[Path] = set()
    waiting = [Path("launch.py")]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [file for name in _imported_names(path) for file in _files_of(name)]
    return found


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.parse((ROOT_DIR / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files_of(name: str) -> Iterator[Path]:
    """The file of one of our modules, and of each package that contains it."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        folder = Path(*parts[:count])
        yield from (file for file in (folder / "__init__.py", folder.with_suffix(".py")) if (ROOT_DIR / file).is_file())
