"""What a long campaign has done so far, one line of JSON a case, so that a campaign that was stopped goes on where it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Case `number` of one plan: what came of it in a word, what was not as promised, how many disturbances reached it, how long it took, on which
    commit."""

    plan: str
    number: int
    result: str
    found: tuple[str, ...] = ()
    struck: int = 1
    seconds: float = 0.0
    commit: str = ""


class Progress:
    """Cases of a campaign; kept in `path` too where there is one, each as soon as it is over."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.commit = _commit()
        self.cases: list[Case] = list(_read(path)) if path is not None and path.exists() else []

    def add(self, plan: str, number: int, result: str, found: list[str], seconds: float, *, struck: int = 1) -> None:
        """A case that is over."""
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
        """All that was not as promised."""
        return [f"{case.plan}: {text}" for case in self.cases for text in case.found]

    @property
    def seconds(self) -> float:
        return sum(case.seconds for case in self.cases)

    @property
    def commits(self) -> list[str]:
        """Those that cases ran on, in order."""
        return list(dict.fromkeys(case.commit for case in self.cases if case.commit))


def _read(path: Path) -> Iterator[Case]:
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        yield Case(**{**values, "found": tuple(values["found"])})


def _commit() -> str:
    """The commit of the source; "" where there is no git."""
    try:
        answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()
