"""Stage 5: what the exported checkpoint can do according to the judge, using the product's own loader and sampler."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tools.demo_model.judge import Verdict, judge_picture
from tools.demo_model.product import installed_product, make_text_picture
from tools.demo_model.scenes import CELLS, Scene, Thing, describe_scene, sample_scene

PictureMaker = Callable[[Sequence[str]], Sequence[Image.Image]]


@dataclass(frozen=True, slots=True)
class Case:
    scene: Scene
    prompt: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Score:
    colour: bool  # the colors found are those requested
    shape: bool
    objects: bool  # color and shape of every object, none missing, none extra
    background: bool
    place: bool  # in the requested cell, or in the requested relation


def draw_cases(num_cases: int, *, seed: int = 123, held_out_share: float = 0.2) -> list[Case]:
    """Prompts with complete descriptions, half with one object; the first fifth are combinations held out of training."""
    rng = random.Random(seed)
    cases = []
    for index in range(num_cases):
        held_out = index < round(num_cases * held_out_share)
        scene = sample_scene(rng, two_things_share=float(index % 2), held_out=held_out)
        cases.append(Case(scene, describe_scene(scene, rng, full=True), held_out))
    return cases


def score_verdict(scene: Scene, verdict: Verdict) -> Score:
    asked, found = scene.things, verdict.findings
    same_colours = Counter(thing.colour for thing in asked) == Counter(finding.colour for finding in found)
    same_shapes = Counter(thing.shape for thing in asked) == Counter(finding.shape for finding in found)
    pairs = Counter((thing.colour, thing.shape) for thing in asked) == Counter((finding.colour, finding.shape) for finding in found)
    return Score(same_colours, same_shapes, pairs, verdict.background == scene.background, pairs and _is_placed(asked, verdict))


def _is_placed(asked: Sequence[Thing], verdict: Verdict) -> bool:
    found = sorted(verdict.findings, key=lambda finding: (finding.x, finding.y))
    if len(asked) == 1:
        return _cell_of(found[0].x, found[0].y) == asked[0].cell
    axis = 0 if asked[0].cell[1] == asked[1].cell[1] else 1
    by_asked = [(thing.colour, thing.shape) for thing in sorted(asked, key=lambda thing: thing.cell[axis])]
    by_found = [(finding.colour, finding.shape) for finding in sorted(found, key=lambda finding: (finding.x, finding.y)[axis])]
    return by_asked == by_found


def _cell_of(x: float, y: float) -> tuple[int, int]:
    """The cell of the 3x3 grid whose usual object center is nearest."""
    return min(CELLS, key=lambda cell: (0.22 + 0.28 * cell[0] - x) ** 2 + (0.22 + 0.28 * cell[1] - y) ** 2)


def score_cases(cases: Sequence[Case], make_pictures: PictureMaker) -> list[Score]:
    pictures = make_pictures([case.prompt for case in cases])
    return [score_verdict(case.scene, judge_picture(picture)) for case, picture in zip(cases, pictures, strict=True)]


def tabulate(cases: Sequence[Case], scores: Sequence[Score]) -> str:
    """A Markdown table: rows are groups of cases, columns the share of correct ones."""
    groups: dict[str, Callable[[Case], bool]] = {
        "one object": lambda case: len(case.scene.things) == 1,
        "one object, held out": lambda case: len(case.scene.things) == 1 and case.held_out,
        "two objects": lambda case: len(case.scene.things) == 2,
        "two objects, held out": lambda case: len(case.scene.things) == 2 and case.held_out,
        "all": lambda _: True,
    }
    lines = ["| prompts | number | colour | shape | objects | place | background |", "|---|---|---|---|---|---|---|"]
    for name, belongs in groups.items():
        chosen = [score for case, score in zip(cases, scores, strict=True) if belongs(case)]
        if chosen:
            shares = [sum(getattr(score, field) for score in chosen) / len(chosen) for field in ("colour", "shape", "objects", "place", "background")]
            lines.append(f"| {name} | {len(chosen)} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines)


@contextmanager
def product_pictures(
    checkpoint: Path, *, num_steps: int = 20, cfg_scale: float = 5.0, sampler: str = "Euler a", first_seed: int = 1
) -> Iterator[PictureMaker]:
    """Makes pictures with the product itself: its loader, samplers and decoder, in its own data folder.

    Prompt k gets seed `first_seed` + k, so that no two prompts share noise.
    """
    fields = {"steps": num_steps, "cfg_scale": cfg_scale, "sampler_name": sampler}
    with installed_product(checkpoint):
        yield lambda prompts: [make_text_picture(prompt, seed=first_seed + index, **fields) for index, prompt in enumerate(prompts)]


def evaluate_checkpoint(checkpoint: Path, *, num_cases: int = 200) -> tuple[str, Image.Image]:
    """The table of `num_cases` prompts and a contact sheet of the first hundred pictures."""
    cases = draw_cases(num_cases)
    with product_pictures(checkpoint) as make_pictures:
        pictures = list(make_pictures([case.prompt for case in cases]))
    scores = [score_verdict(case.scene, judge_picture(picture)) for case, picture in zip(cases, pictures, strict=True)]
    return tabulate(cases, scores), make_contact_sheet(pictures[:100])


def make_contact_sheet(pictures: Sequence[Image.Image], *, columns: int = 10) -> Image.Image:
    width_px, height_px = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width_px, rows * height_px))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width_px, index // columns * height_px))
    return sheet
