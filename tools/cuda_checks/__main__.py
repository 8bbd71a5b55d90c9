"""`python -m tools.cuda_checks --out FOLDER`: what can only be seen on a real card, question by question, in a few minutes.

Writes results.jsonl (every finding as it is made), report.md, console.log and some files to look at. `--device cpu --tiny` rehearses it anywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a card must not start the driver before the fork
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

_PATIENCE = 6.0
"""Rehearsals may take so many times a check's limit: a few cores stand in for a card."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the checks that are asked for; 0 when all ended and what they expect holds."""
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_checks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl, report.md and the files to look at")
    parser.add_argument("--device", choices=("cuda", "cpu", "virtual"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="narrow networks and small pictures: a rehearsal")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="all but these")
    parser.add_argument("--total-seconds", type=float, default=300.0, help="checks that would begin later are left out")
    parser.add_argument("--isolated", choices=("fork", "spawn", "none"), default="fork", help="how each check gets a process of its own")
    parser.add_argument("--list", action="store_true", help="print the checks and run none")
    options = parser.parse_args(arguments)

    from tools.cuda_checks.catalogue import choose_checks  # heavy, and after the environment is set
    from tools.cuda_checks.machine import Machine, scratch_folder
    from tools.cuda_checks.runner import RESULTS, run_checks

    chosen = choose_checks(options.only, options.skip)
    if options.list:
        print("\n".join(f"{check.name:20} issue {check.issue}, at most {check.limit_s:.0f} s: {check.question}" for check in chosen))
        return 0
    with scratch_folder() as shared_dir:
        machine = Machine(kind=options.device, tiny=options.tiny, shared_dir=shared_dir, out_dir=options.out)
        (options.out / RESULTS).unlink(missing_ok=True)
        num_bad = run_checks(
            chosen, machine, options.out, total_s=options.total_seconds, patience=_PATIENCE if options.tiny else 1.0, isolated=options.isolated
        )
    print(f"{len(chosen)} checks, {num_bad} with something that does not hold: {options.out / 'report.md'}")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
