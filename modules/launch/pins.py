"""The package versions that the program needs, whether they are installed, and what extension installers were refused. Standard library only.

We do not use torchvision and torchaudio, but each of their builds works with only one build of torch, and transformers cannot be imported while a
mismatched one is installed. So they are pinned too once torch is installed.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.launch import pip

_PIN = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)(?:\[[\w,-]+\])?==(?P<version>[^\s;]+)(?:;(?P<marker>.*))?$")
_MARKER = re.compile(r"^python_version(?P<operator>>=|<=|==|<|>)[\"'](?P<major>\d+)\.(?P<minor>\d+)[\"']$")
_COMPARISONS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_TORCH = re.compile(r"^(?P<major>\d+)\.(?P<minor>\d+)\.(?P<patch>\d+)(?P<build>\+.*)?$")
_TORCHVISION_AHEAD = 15
"""torchvision 0.N is made for torch 2.(N - 15)."""

_WANTED, _HELD, _NEEDED = "The user requested ", "The user requested (constraint) ", " depends on "
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_LIST_FLAGS = ("-r", "--requirement")
_LOG_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d+ ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An installer asked for `wanted`, but the program needs `name` at `version`. `who`: the package that depends on it, or ""."""

    name: str
    version: str
    wanted: str
    who: str = ""

    @property
    def asked(self) -> str:
        """The normalized name of the package that is not installed."""
        return normalized(_name_of(self.who or self.wanted))

    def __str__(self) -> str:
        subject = f"{self.who}, which needs {self.wanted}" if self.who else self.wanted
        return f"refused: {subject}. The program runs with {self.name} {self.version} and keeps it"


def normalized(name: str) -> str:
    """A package's name in the form that indexes compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _name_of(requirement: str) -> str:
    match = _NAME.match(requirement)
    return match[0] if match else ""


def read_pins(text: str) -> dict[str, str]:
    """Package -> version, from the lines of a requirements file that pin a package for this Python."""
    pins = {}
    for line in text.splitlines():
        match = _PIN.match(re.sub(r"\s", "", line.split("#")[0]))
        if match and _applies(match["marker"]):
            pins[match["name"]] = match["version"]
    return pins


def _applies(marker: str | None) -> bool:
    """Whether a marker about the Python version holds. Lines with any other marker are not pins."""
    if not marker:
        return True
    match = _MARKER.match(marker)
    if match is None:
        return False
    wanted, running = (int(match["major"]), int(match["minor"])), (sys.version_info[0], sys.version_info[1])
    return bool(_COMPARISONS[match["operator"]](running, wanted))


def companions_of_torch(torch_version: str | None) -> dict[str, str]:
    """The torchvision and torchaudio made for this build of torch: 2.13.0+cpu -> 0.28.0+cpu and 2.13.0+cpu. Empty for any other version scheme."""
    match = _TORCH.match(torch_version or "")
    if match is None or match["major"] != "2":
        return {}
    end = f"{match['patch']}{match['build'] or ''}"
    return {"torchvision": f"0.{int(match['minor']) + _TORCHVISION_AHEAD}.{end}", "torchaudio": f"2.{match['minor']}.{end}"}


def constraints(pins: Mapping[str, str]) -> list[str]:
    """Lines of a pip constraints file: the installed build of torch, its companions, and every installed pinned package at its pinned version."""
    torch_version = pip.installed_version("torch")
    lines = [] if torch_version is None else [f"torch=={torch_version}"]
    held = {name: version for name, version in pins.items() if name != "torch" and pip.installed_version(name) is not None}
    return lines + [f"{name}=={version}" for name, version in {**companions_of_torch(torch_version), **held}.items()]


def differing(pins: Mapping[str, str]) -> dict[str, str | None]:
    """Package -> installed version (None if missing) of every pinned package whose version is wrong. The build (`+cpu`) does not matter."""
    installed = {name: pip.installed_version(name) for name in pins}
    return {name: version for name, version in installed.items() if (version or "").split("+")[0] != pins[name].split("+")[0]}


def misfits_of_torch() -> dict[str, str]:
    """Package -> installed version of torchvision and torchaudio, if built for a different torch or a different build of it."""
    found = {}
    for name, wanted in companions_of_torch(pip.installed_version("torch")).items():
        installed = pip.installed_version(name)
        if installed is not None and installed != wanted:
            found[name] = installed
    return found


def find_refusals(output: str) -> list[Refusal]:
    """The packages that pip did not install because of a constraint, read from its output or log."""
    refusals: list[Refusal] = []
    for part in _LOG_TIME.sub("", output).split("The conflict is caused by:")[1:]:
        lines = [line.strip() for line in part.split("To fix this you could")[0].splitlines()]
        held = [line.removeprefix(_HELD).partition("==") for line in lines if line.startswith(_HELD)]
        asked = [("", line.removeprefix(_WANTED)) for line in lines if line.startswith(_WANTED) and not line.startswith(_HELD)]
        asked += [(who, wanted) for who, needs, wanted in (line.partition(_NEEDED) for line in lines) if needs]
        for name, _, version in held:
            same = [(who, wanted) for who, wanted in asked if normalized(_name_of(wanted)) == normalized(name.strip())]
            refusals += [Refusal(name.strip(), version.strip(), wanted, who) for who, wanted in same]
    return list(dict.fromkeys(refusals))


def leave_out(words: Sequence[str], refusals: Sequence[Refusal], folder: Path) -> list[str]:
    """The words of a pip command without the refused requirements. Requirements files (`-r FILE`) are copied into `folder` without them."""
    refused = {refusal.asked for refusal in refusals}
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] in _LIST_FLAGS:
            kept.append(str(_shortened(Path(word), refused, folder)))
        elif word.startswith("-") or normalized(_name_of(word)) not in refused:
            kept.append(word)
    return kept


def _shortened(requirements: Path, refused: set[str], folder: Path) -> Path:
    """A copy of the file in `folder` without the refused packages; the file itself if it names none of them or cannot be read."""
    try:
        lines = requirements.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        return requirements
    kept = [line for line in lines if normalized(_name_of(line.strip())) not in refused]
    if kept == lines:
        return requirements
    copy = folder / f"{len(list(folder.iterdir()))}.txt"
    copy.write_text("\n".join([*kept, ""]), encoding="utf-8")
    return copy


def names_a_requirement(words: Sequence[str]) -> bool:
    """Whether a pip command (`install`, options, requirements) still has something to install."""
    return any(not word.startswith("-") or word in _LIST_FLAGS for word in words[1:])
