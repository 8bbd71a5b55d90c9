"""Progress of a long campaign, one line of JSON per case, so that a stopped campaign can resume."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Case `number` of one plan: its result in a word, broken promises, number of disturbances that reached it, duration, and commit."""

    plan: str
    number: int
    result: str
    found: tuple[str, ...] = ()
    struck: int = 1
    seconds: float = 0.0
    commit: str = ""


class Progress:
    """Cases of a campaign; if there is a `path`, each is also appended to that file as soon as it ends."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.commit = _commit()
        self.cases: list[Case] = list(_read(path)) if path is not None and path.exists() else []

    def add(self, plan: str, number: int, result: str, found: list[str], seconds: float, *, struck: int = 1) -> None:
        """Record a finished case."""
        case = Case(plan=plan, number=number, result=result, found=tuple(found), struck=struck, seconds=round(seconds, 2), commit=self.commit)
        self.cases.append(case)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(asdict(case))}\n")

    def of(self, plan: str) -> list[Case]:
        """The cases of one plan."""
        return [case for case in self.cases if case.plan == plan]

    def done(self, plan: str) -> set[int]:
        """Numbers of the cases that need not run again."""
        return {case.number for case in self.of(plan)}

    @property
    def found(self) -> list[str]:
        """All broken promises."""
        return [f"{case.plan}: {text}" for case in self.cases for text in case.found]

    @property
    def seconds(self) -> float:
        return sum(case.seconds for case in self.cases)

    @property
    def commits(self) -> list[str]:
        """The commits that cases ran on, in order."""
        return list(dict.fromkeys(case.commit for case in self.cases if case.commit))


def _read(path: Path) -> Iterator[Case]:
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        yield Case(**{**values, "found": tuple(values["found"])})


def _commit() -> str:
    """The commit of the source; "" without git."""
    try:
        answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()
