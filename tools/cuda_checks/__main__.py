"""`python -m tools.cuda_checks --out FOLDER`: checks that need a real GPU, one question at a time, in a few minutes.

Writes results.jsonl (each finding immediately), report.md, console.log and some files to look at. `--device cpu --tiny` rehearses it anywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # checking for a GPU must not initialize the driver before the fork
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

_PATIENCE = 6.0
"""Factor for time limits in rehearsals, where a few CPU cores replace a GPU."""


def main(arguments: list[str] | None = None) -> int:
    """Run the selected checks; returns 0 if all completed and all expectations hold."""
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_checks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl, report.md and the files to look at")
    parser.add_argument("--device", choices=("cuda", "cpu", "virtual"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="rehearse with narrow networks and small pictures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these checks")
    parser.add_argument("--skip", nargs="+", metavar="NAME", default=[], help="skip these checks")
    parser.add_argument("--total-seconds", type=float, default=300.0, help="checks that would start later are skipped")
    parser.add_argument("--isolated", choices=("fork", "spawn", "none"), default="fork", help="how to give each check its own process")
    parser.add_argument("--list", action="store_true", help="list the checks without running them")
    options = parser.parse_args(arguments)

    from tools.cuda_checks.catalogue import choose_checks  # heavy; after setting the environment
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
