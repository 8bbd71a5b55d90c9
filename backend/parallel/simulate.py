"""`python -m backend.parallel.simulate --gpus 2xRTX3090,1xRTX4090 --model sdxl --size 2048x2048`: what would these cards do?

A command-line program, the only part of the engine that reads a command line. Nothing imports it; simulation.py computes what it prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from backend.parallel.planning.simulation import (
    SimulatedJob,
    SimulationError,
    link_names,
    model_names,
    parse_cards,
    parse_picture_size,
    report,
    simulate,
    usual_cfg,
    weights_names,
)
from backend.parallel.planning.validation import validation_tables


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m backend.parallel.simulate", description="Predict plan, time per step and bytes per card.")
    parser.add_argument("--gpus", help="cards, like 2xRTX3090,1xRTX4090")
    parser.add_argument("--model", default="sdxl", help=f"one of {', '.join(model_names())}")
    parser.add_argument("--size", default="1024x1024", help="width x height in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--cfg", type=float, default=None, help="CFG scale; 1 means no unconditional branch; by default what the model is run with")
    parser.add_argument("--weights", default="half", help="how denoiser and text encoders are stored: half, fp8, fp8_scaled, nf4, q8_0, q4_k ...")
    parser.add_argument("--strategy", default="auto", choices=["auto", "single", "replicas", "tiles", "layers", "hybrid"])
    parser.add_argument("--link", default=None, help=f"how cards are linked: one of {', '.join(link_names())}; by default what they have")
    parser.add_argument("--controlnet", action="store_true", help="with one ControlNet")
    parser.add_argument("--validate", action="store_true", help="print predictions and published figures instead")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the prediction. Returns the exit code: 2, with a message on stderr, for an unknown card, model, size or link."""
    options = make_parser().parse_args(arguments)
    try:
        text = validation_tables() if options.validate else report(simulate(_job_of(options)))
    except SimulationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{text}\n")
    return 0


def _job_of(options: argparse.Namespace) -> SimulatedJob:
    if not options.gpus:
        raise SimulationError("No cards were given. Name them with --gpus, as in --gpus 2xRTX3090,1xRTX4090, or use --validate.")
    if options.batch < 1:
        raise SimulationError(f"--batch {options.batch} was given; it must be at least 1.")
    if options.weights not in weights_names():
        raise SimulationError(f"--weights {options.weights!r} is unknown. Known: {', '.join(weights_names())}.")
    width_px, height_px = parse_picture_size(options.size)
    return SimulatedJob(
        cards=parse_cards(options.gpus),
        model=options.model,
        width_px=width_px,
        height_px=height_px,
        images=options.batch,
        branches=1 if (usual_cfg(options.model) if options.cfg is None else options.cfg) == 1 else 2,
        strategy=options.strategy,
        link=options.link,
        has_controlnet=options.controlnet,
        weights=options.weights,
    )


if __name__ == "__main__":
    sys.exit(main())
