"""`python -m tools.convert_checkpoint SOURCE... --out TARGET`: another type, parts taken out or put together, LoRA merged in.

    python -m tools.convert_checkpoint flux1-dev.safetensors --to q8_0 --out flux1-dev-Q8_0.gguf
    python -m tools.convert_checkpoint sd_xl.safetensors --part vae --out xl_vae.safetensors
    python -m tools.convert_checkpoint flux.gguf ae.safetensors clip_l.safetensors t5xxl.safetensors --to fp8_scaled --out whole.safetensors
    python -m tools.convert_checkpoint model.safetensors --lora style.safetensors:0.8 --to fp16 --out model-style.safetensors

The target gets its name when it is complete; an existing file is never replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    from backend.checkpoint_converter import KEEP, PARTS, conversion_types  # imports torch

    parser = argparse.ArgumentParser(prog="python -m tools.convert_checkpoint", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", nargs="+", type=Path, help="a model file, or several that are put together")
    parser.add_argument("--out", required=True, type=Path, help="the file to write, .safetensors or .gguf")
    parser.add_argument("--to", default=KEEP, help=f"how weights are stored: {', '.join(conversion_types())}; by default as they are")
    parser.add_argument("--part", default="all", help=f"what to take: {', '.join(PARTS)}")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="merge it into the denoiser and the text encoders; may be repeated"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2, with a message on stderr, for files or choices that cannot be used."""
    from tqdm import tqdm

    from backend.checkpoint_converter import Conversion, ConversionError, convert_checkpoint
    from backend.checkpoint_file import CheckpointError
    from backend.patcher.lora_files import LoraError

    options = make_parser().parse_args(arguments)
    try:
        loras = tuple(_parse_lora(text) for text in options.lora)
        job = Conversion(sources=tuple(options.sources), target=options.out, to=options.to, part=options.part, loras=loras)
        with tqdm(unit="B", unit_scale=True, disable=None) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            num_bytes = convert_checkpoint(job, report)
    except (ConversionError, CheckpointError, LoraError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{options.out}: {num_bytes / 1e9:.2f} GB\n")
    return 0


def _parse_lora(text: str) -> tuple[Path, float]:
    """ "style.safetensors:0.8", or a path alone at strength 1."""
    path, _, strength = text.rpartition(":")
    try:
        return (Path(path), float(strength)) if path else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


if __name__ == "__main__":
    sys.exit(main())
