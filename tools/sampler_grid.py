"""`python -m tools.sampler_grid`: every sampler with one prompt and seed, made by the product with the demo checkpoint, as one labeled picture.

`--cases N` lets the demo checkpoint's judge evaluate N more pictures per sampler; the printed table is kept in docs/samplers.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.demo_model.evaluate import Case, draw_cases, score_verdict
from tools.demo_model.judge import judge_picture
from tools.demo_model.product import DEMO_CHECKPOINT, installed_product, make_text_picture

PROMPT = "a large blue triangle left of a large yellow square on a grey background"
SEED = 2
NUM_COLUMNS = 5
CELL_PX, LABEL_PX = 128, 18
GRID_FILE = Path(__file__).resolve().parents[1] / "docs" / "images" / "samplers.png"


def sampler_names() -> list[str]:
    """The samplers in the product's order."""
    from backend.sampling.registry import SAMPLERS  # imports torch

    return [spec.name for spec in SAMPLERS]


def make_sampler_pictures(names: Sequence[str], prompt: str = PROMPT, *, seed: int = SEED, num_steps: int = 20) -> Iterator[tuple[str, Image.Image]]:
    """(sampler, picture), each with the sampler's Automatic schedule. The product must be installed."""
    for name in names:
        yield name, make_text_picture(prompt, seed=seed, sampler_name=name, scheduler="Automatic", steps=num_steps)


def lay_labelled_grid(pictures: Sequence[tuple[str, Image.Image]], *, num_columns: int = NUM_COLUMNS) -> Image.Image:
    """The pictures row by row, enlarged without smoothing, each below its name."""
    num_rows = -(-len(pictures) // num_columns)
    grid = Image.new("RGB", (num_columns * CELL_PX, num_rows * (CELL_PX + LABEL_PX)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=12)
    for index, (name, picture) in enumerate(pictures):
        x, y = index % num_columns * CELL_PX, index // num_columns * (CELL_PX + LABEL_PX)
        draw.text((x + CELL_PX / 2, y + LABEL_PX / 2), name, fill="black", font=font, anchor="mm")
        grid.paste(picture.resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST), (x, y + LABEL_PX))
    return grid


def count_right_pictures(names: Sequence[str], cases: Sequence[Case]) -> dict[str, tuple[int, int, int]]:
    """By sampler: how many cases have the right background, the right colors, and the right objects (color and shape) according to the judge."""
    counts = {}
    for name in names:
        scores = [
            score_verdict(case.scene, judge_picture(picture))
            for index, case in enumerate(cases)
            for _, picture in make_sampler_pictures([name], case.prompt, seed=index + 1)
        ]
        counts[name] = (sum(s.background for s in scores), sum(s.colour for s in scores), sum(s.objects for s in scores))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sampler_grid", description=__doc__)
    parser.add_argument("--out", type=Path, default=GRID_FILE)
    parser.add_argument("--cases", type=int, default=0, help="pictures per sampler to evaluate (default: none)")
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    args = parser.parse_args()
    with installed_product(args.checkpoint):
        lay_labelled_grid(list(make_sampler_pictures(sampler_names()))).save(args.out, optimize=True)
        if args.cases:
            print("| sampler | pictures | background | colours | objects |\n|---|---|---|---|---|")
            for name, (background, colours, objects) in count_right_pictures(sampler_names(), draw_cases(args.cases)).items():
                print(f"| {name} | {args.cases} | {background} | {colours} | {objects} |")


if __name__ == "__main__":
    main()
