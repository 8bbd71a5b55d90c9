"""Implements `tools/bench`: finds the benches, runs one, writes `benchmarks/<theme>.md`.

A bench is a module `benchmarks/<theme>.py` with `BENCH = Bench(...)`. Text that a person writes under "## Reading" in the report is preserved.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.core_share import CoreShare, measure_core_share, wait_for_quiet
from tools.development import ROOT_DIR, enter_environment
from tools.measure import Bench, Samples, measure, raw_lines, report_table

BENCH_DIR = ROOT_DIR / "benchmarks"
READING = "## Reading"


def list_themes(folder: Path = BENCH_DIR) -> dict[str, str]:
    """theme -> first line of its module's docstring, without importing the module."""
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0] for path in paths}


def describe_machine() -> str:
    """Processor, cores, memory and system, which numbers depend on; not the machine's name."""
    import psutil  # installed during setup, not available before

    memory_gb = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {os.cpu_count()} cores, {memory_gb:.0f} GB, {platform.system()} {platform.machine()}{_gpus()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _gpus() -> str:
    import torch  # heavy; only available after setup

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return "".join(f", {name}" for name in names)


def describe_versions(packages: Sequence[str]) -> str:
    """`Python 3.11.7, torch 2.13.0`."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {importlib.metadata.version(name)}" for name in packages)])


def write_report(path: Path, theme: str, bench: Bench, samples: Mapping[str, Samples], *, command: str, cores: str = "") -> None:
    """Write the report; preserves the text under "## Reading". `cores`: how much of the machine the bench got."""
    reading = ""
    if path.exists():
        _, mark, reading = path.read_text(encoding="utf-8").partition(READING)
        reading = mark + reading
    num_rounds = len(samples[bench.baseline].times_s)
    lines = [
        *(f"# {theme}", "", bench.question, ""),
        *(f"- command: `{command}`", f"- date: {time.strftime('%Y-%m-%d')}", f"- machine: {describe_machine()}"),
        *([f"- cores: {cores}"] if cores else []),
        *(f"- versions: {describe_versions(bench.packages)}", f"- {num_rounds} rounds, variants in turns, every other round backwards", ""),
        *(*report_table(bench, samples), "", "Raw, round by round:", "", "```", *raw_lines(samples), "```", ""),
    ]
    path.write_text("\n".join(lines) + (f"\n{reading}" if reading else ""), encoding="utf-8")


def run_benches(argv: Sequence[str], script: str) -> int:
    """Run one bench by theme, or list them."""
    parser = argparse.ArgumentParser(prog="tools/bench", description="Measures variants alternately and writes benchmarks/<theme>.md.")
    parser.add_argument("theme", nargs="?", help="a theme; without arguments, all themes are listed")
    parser.add_argument("--rounds", type=int, help="how often each variant is measured")
    parser.add_argument("--print-only", action="store_true", help="write no file")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for a quiet machine before measuring anyway")
    arguments = parser.parse_args(argv)
    themes = list_themes()
    if arguments.theme not in themes:
        print("\n".join(f"{theme:24} {line}" for theme, line in themes.items()) or "There are no benches yet.")
        if arguments.theme:
            print(f"ERROR: there is no bench {arguments.theme}.")
        return 2 if arguments.theme else 0
    enter_environment(argv, script)
    bench: Bench = importlib.import_module(f"benchmarks.{arguments.theme}").BENCH
    before = wait_for_quiet(arguments.patience)
    samples = measure(bench, num_rounds=arguments.rounds)
    cores = _describe_cores(before, measure_core_share())
    print("\n".join([*report_table(bench, samples), f"cores: {cores}"]))
    if not arguments.print_only:
        path = BENCH_DIR / f"{arguments.theme}.md"
        write_report(path, arguments.theme, bench, samples, command=" ".join(["python tools/bench", *argv]), cores=cores)
        print(f"Written: {path.relative_to(ROOT_DIR)}")
    return 0


def _describe_cores(before: CoreShare, after: CoreShare) -> str:
    warning = "" if before.is_quiet and after.is_quiet else "; THE MACHINE WAS BUSY, compare CPU seconds"
    return f"two threads of matrix products got {before} before and {after} after{warning}"
