"""Tests whether cards may copy to each other directly. Some drivers offer this and then hang, or deliver wrong bytes without an error.

So each pair is tested in a subprocess with a time limit before it is trusted; otherwise tensors go through main memory. Results are cached in a
file for these cards, this driver and this boot: firmware settings that break such copies (ACS, IOMMU) change only with a reboot.
`judge` is pure; `link_verdicts` starts the subprocess.
"""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from backend.devices.links import Verdict
from backend.devices.slot import Slot
from backend.devices.telemetry import read_telemetry
from backend.foreign_json import read_json_file
from backend.unfinished_files import replace_content

logger = logging.getLogger(__name__)

CardPair = tuple[int, int]
"""Indexes of two CUDA devices in this process: from, to."""
Report = Mapping[str, Any]
"""What `link_probe` reported about a pair."""
Ending = Literal["done", "hang", "crash"]

FIRST_LINE_LIMIT_S = 90.0
"""Time for a process to import torch and create CUDA contexts."""
LINE_LIMIT_S = 30.0
"""Time for one pair. A link of 0.1 GB/s would take this long."""

_DEFAULT_CACHE_FILE = Path(__file__).parents[2] / "cache" / "links.json"
_ROOT_DIR = Path(__file__).parents[2]

_ENDINGS: Mapping[Ending, str] = {"hang": "its test did not end in time", "crash": "its test crashed", "done": "its test reported nothing"}
_WRONG = "wrong bytes"
WRONG_DATA_REMEDY = (
    "Pictures are still correct, because tensors go through main memory. To get direct copies, turn off ACS or set the IOMMU to pass-through in "
    "the firmware or with the kernel option iommu=pt, and update the driver. Until then set NCCL_P2P_DISABLE=1 for other programs."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """The result of one run of the subprocess: a report per finished pair, how it ended, and `during` which pair."""

    reports: Mapping[CardPair, Report]
    ending: Ending
    during: CardPair | None = None


Runner = Callable[[Sequence[CardPair]], ProbeResult]


@dataclass(slots=True)
class _Cache:
    """The file that stores verdicts between runs, and the verdicts of this run."""

    path: Path = _DEFAULT_CACHE_FILE
    known: dict[str, Verdict] | None = None


_cache = _Cache()
_lock = threading.Lock()


def keep_verdicts_in(folder: Path) -> None:
    """Store test results in `folder`/links.json. The default is the program's own cache folder."""
    with _lock:
        _cache.path, _cache.known = folder / "links.json", None


def link_verdicts(slots: Sequence[Slot]) -> dict[tuple[int, int], Verdict]:
    """The route for every ordered pair of slots, by index. Tests untested links between CUDA devices (seconds each)."""
    pairs = [(source, target) for source in slots for target in slots if source.index != target.index]
    cards = sorted({(_card(source), _card(target)) for source, target in pairs if _is_card_pair(source, target)})
    by_card = _verdicts_of_cards(cards) if cards else {}
    return {
        (source.index, target.index): by_card[_card(source), _card(target)] if _is_card_pair(source, target) else trivial_verdict(source, target)
        for source, target in pairs
    }


def verdict_of(source: Slot, target: Slot) -> Verdict:
    """The route from one slot to another."""
    return link_verdicts((source, target))[source.index, target.index]


def trivial_verdict(source: Slot, target: Slot) -> Verdict:
    """The verdict for slots that share a device, or of which at least one is not a CUDA device. Pure."""
    if source.torch_device == target.torch_device:
        return Verdict(route="same", reason="one device", latency_ms=0.0)
    types = {source.torch_device.type, target.torch_device.type}
    if "cpu" in types:
        return Verdict(route="direct", reason="one end is main memory")
    if types == {"vgpu"}:
        return Verdict(route="direct", reason="virtual GPUs are in main memory")
    return Verdict(route="staged", reason="devices of different or untested kinds")


def _is_card_pair(source: Slot, target: Slot) -> bool:
    one, other = source.torch_device, target.torch_device
    return one.type == other.type == "cuda" and one != other


def _card(slot: Slot) -> int:
    return slot.torch_device.index or 0


# decisions


def judge(report: Report | None, ending: Ending = "done") -> Verdict:
    """The verdict for a pair's report. None means that the process ended (`ending`) before this pair was done. Pure."""
    if report is None:
        return Verdict(route="staged", reason=_ENDINGS[ending])
    staged = report.get("staged", {})
    through_host = Verdict(route="staged", reason="", bytes_per_ms=staged.get("bytes_per_ms"), latency_ms=staged.get("latency_ms"))
    if not report["peer"]:
        return replace(through_host, reason="the driver offers no direct copies between these cards")
    if report["wrong_bytes"]:
        return replace(through_host, reason=f"direct copies delivered {report['wrong_bytes']} {_WRONG}")
    direct = report["direct"]
    if staged and staged["bytes_per_ms"] > direct["bytes_per_ms"] and staged["latency_ms"] < direct["latency_ms"]:
        return replace(through_host, reason=f"direct copies are correct but slower ({direct['bytes_per_ms'] / 1e6:.1f} GB/s)")
    return Verdict(route="peer", reason="checked", bytes_per_ms=direct["bytes_per_ms"], latency_ms=direct["latency_ms"])


def run_all(pairs: Sequence[CardPair], run: Runner) -> dict[CardPair, Verdict]:
    """Verdicts for all pairs. After a hang or crash, the remaining pairs are tested in a new process.

    A pair that fails in one direction is trusted in neither.
    """
    verdicts: dict[CardPair, Verdict] = {}
    left = list(pairs)
    while left:
        result = run(left)
        verdicts.update({pair: judge(report) for pair, report in result.reports.items() if pair in left})
        left = [pair for pair in left if pair not in verdicts]
        # A process that fails before its first pair would also fail before the next one.
        guilty = {result.during, result.during[::-1]} if result.during in left and result.during is not None else set(left)
        verdicts.update({pair: judge(None, result.ending) for pair in left if pair in guilty})
        left = [pair for pair in left if pair not in verdicts]
    return {pair: _with_reverse(verdict, verdicts.get((pair[1], pair[0]))) for pair, verdict in verdicts.items()}


def _with_reverse(verdict: Verdict, reverse: Verdict | None) -> Verdict:
    if verdict.route != "peer" or reverse is None or not _is_failure(reverse):
        return verdict
    return Verdict(route="staged", reason=f"the other direction: {reverse.reason}")


def _is_failure(verdict: Verdict) -> bool:
    return verdict.reason in _ENDINGS.values() or _WRONG in verdict.reason


# running


def run_probe(pairs: Sequence[CardPair]) -> ProbeResult:
    """Start the subprocess, read its lines, and kill it if one does not arrive in time."""
    process = subprocess.Popen(
        [sys.executable, "-m", "backend.devices.link_probe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=_ROOT_DIR,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process.stdout, lines), name="link-test", daemon=True).start()
    try:
        with process.stdin:
            process.stdin.write(json.dumps({"pairs": list(pairs)}))
    except OSError:  # it ended before reading its input
        return ProbeResult(reports={}, ending="crash")
    try:
        return follow(_lines_in_time(lines), len(pairs))
    finally:
        _end_process(process)


def follow(lines: Iterator[str | None], num_pairs: int) -> ProbeResult:
    """Read reports from the subprocess's lines until all are complete. A None means that the next line did not arrive in time. Pure."""
    reports: dict[CardPair, Report] = {}
    during: CardPair | None = None
    for line in lines:
        if line is None:
            return ProbeResult(reports=reports, ending="hang", during=during)
        said = _parse(line)
        if "begin" in said:
            during = (said["begin"][0], said["begin"][1])
        elif "pair" in said:
            reports[said["pair"][0], said["pair"][1]] = said
            during = None
            if len(reports) == num_pairs:
                break
    return ProbeResult(reports=reports, ending="done" if during is None else "crash", during=during)


def _parse(line: str) -> dict[str, Any]:
    """A line as JSON; empty for anything that a library printed between our lines."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
    stream.close()


def _lines_in_time(lines: queue.Queue[str | None]) -> Iterator[str | None]:
    """Lines until the process ends. The last is None if it was silent for too long."""
    limit_s = FIRST_LINE_LIMIT_S
    while True:
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        limit_s = LINE_LIMIT_S
        yield line


def _end_process(process: subprocess.Popen[str]) -> None:
    """Kill the process. One that hangs in the kernel because of a card cannot be killed and is left."""
    process.kill()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        logger.warning("The link test (process %d) hangs in the driver and cannot be killed. Reboot when convenient.", process.pid)


# the cache


def _verdicts_of_cards(pairs: Sequence[CardPair], run: Runner = run_probe) -> dict[CardPair, Verdict]:
    with _lock:
        cards = {card for pair in pairs for card in pair}
        names, system = {card: _identify_card(card) for card in cards}, _identify_system()
        keys = {pair: f"{names[pair[0]]} > {names[pair[1]]} | {system}" for pair in pairs}
        known = _read_cache()
        new = [pair for pair in pairs if keys[pair] not in known]
        if new:
            logger.info("Testing the links between %d cards, once after each boot.", len(cards))
            for pair, verdict in run_all(new, run).items():
                known[keys[pair]] = verdict
                _log_verdict(pair, verdict)
            _write_cache({key: verdict for key, verdict in known.items() if key.endswith(system)})
        return {pair: known[keys[pair]] for pair in pairs}


def _log_verdict(pair: CardPair, verdict: Verdict) -> None:
    if _WRONG in verdict.reason:
        logger.warning("Link cuda:%d to cuda:%d: %s. %s", *pair, verdict, WRONG_DATA_REMEDY)
    else:
        logger.info("Link cuda:%d to cuda:%d: %s.", *pair, verdict)


def _identify_card(card: int) -> str:
    facts = torch.cuda.get_device_properties(card)
    return f"{facts.name} {getattr(facts, 'uuid', None) or getattr(facts, 'pci_bus_id', card)}"


def _identify_system() -> str:
    """The driver, torch's CUDA version and this boot."""
    cards = read_telemetry()
    driver = cards[0].driver if cards else "?"
    return f"driver {driver}, CUDA {torch.version.cuda or torch.version.hip}, boot {_identify_boot()}"


def _identify_boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(round(psutil.boot_time() / 60))


def _read_cache() -> dict[str, Verdict]:
    if _cache.known is None:
        _cache.known = _load_verdicts(_cache.path)
    return _cache.known


def _load_verdicts(path: Path) -> dict[str, Verdict]:
    """The file's verdicts; empty if it does not exist or is damaged."""
    try:
        entries = read_json_file(path)
        return {key: Verdict(**entry) for key, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s). Links will be tested again.", path, error)
        return {}


def _write_cache(verdicts: Mapping[str, Verdict]) -> None:
    """Write the file atomically: it is either complete or the old one."""
    fields = ("route", "reason", "bytes_per_ms", "latency_ms")
    entries = {key: {name: getattr(verdict, name) for name in fields} for key, verdict in verdicts.items()}
    try:
        replace_content(_cache.path, json.dumps(entries, indent=1).encode())
    except OSError as error:
        logger.warning("%s cannot be written (%s). Links will be tested again at the next start.", _cache.path, error)
