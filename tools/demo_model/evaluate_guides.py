"""What the demo checkpoint's ControlNet and LoRA do according to the judge, using the product's own units and tags."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from tools.demo_model.evaluate import make_contact_sheet
from tools.demo_model.guided_data import draw_lines
from tools.demo_model.judge import Finding, judge_picture
from tools.demo_model.product import DEMO_CONTROLNET, DEMO_LORA, installed_product, make_text_picture
from tools.demo_model.scenes import CELLS, Scene, describe_scene, draw_scene, sample_scene

PLACE_TOLERANCE = 0.08  # of the side; cells are 0.24 or more apart
FORMS = ("line drawing, canny", "white lines, no preprocessor", "filled drawing, canny")
LORA_TAG = f"<lora:{DEMO_LORA.stem}:1>"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True, slots=True)
class GuideCase:
    """A prompt of one object at one place, and the same object drawn elsewhere."""

    said: Scene
    drawn: Scene
    prompt: str


@dataclass(frozen=True, slots=True)
class GuideScore:
    follows: bool  # one object, of the outline's shape, at the outline's place
    shape: bool
    place: bool
    colour: bool  # of the prompt
    background: bool


def draw_guide_cases(num_cases: int, *, seed: int = 321) -> list[GuideCase]:
    rng = random.Random(seed)
    cases = []
    for _ in range(num_cases):
        said = sample_scene(rng, two_things_share=0.0)
        thing = said.things[0]
        elsewhere = replace(thing, cell=rng.choice([cell for cell in CELLS if cell != thing.cell]))
        drawn = replace(said, things=(elsewhere,), jitter=tuple(rng.uniform(-0.03, 0.03) for _ in range(4)))
        cases.append(GuideCase(said, drawn, describe_scene(said, rng, full=True)))
    return cases


def draw_unit(drawn: Scene, form: str) -> dict[str, Any]:
    """A ControlNet unit, as sent by a client, whose picture shows the scene's outlines in one of `FORMS`."""
    module = "None" if form == FORMS[1] else "canny"
    if form == FORMS[0]:
        picture = draw_lines(drawn, width_px=1.5, ink=BLACK, paper=WHITE)
    elif form == FORMS[1]:
        picture = draw_lines(drawn, width_px=1.5, ink=WHITE, paper=BLACK)
    else:
        things = tuple(replace(thing, colour="blue") for thing in drawn.things)
        picture = draw_scene(replace(drawn, things=things, background="white"))
    return {"image": np.asarray(picture), "module": module, "model": DEMO_CONTROLNET.stem, "pixel_perfect": True, "save_detected_map": False}


def score_guided(case: GuideCase, picture: Image.Image) -> GuideScore:
    verdict, wanted = judge_picture(picture), judge_picture(draw_scene(case.drawn)).findings[0]
    found = verdict.findings[:1]
    shape = any(one.shape == case.drawn.things[0].shape for one in found)
    place = any(_distance(one, wanted) <= PLACE_TOLERANCE for one in found)
    colour = any(one.colour == case.said.things[0].colour for one in found)
    return GuideScore(shape and place and len(verdict.findings) == 1, shape, place, colour, verdict.background == case.said.background)


def _distance(one: Finding, other: Finding) -> float:
    return float(np.hypot(one.x - other.x, one.y - other.y))


def make_guided(cases: Sequence[GuideCase], form: str | None, *, first_seed: int = 1) -> list[Image.Image]:
    """Pictures from the installed product; without a form, no unit guides them."""
    units = [[] if form is None else [draw_unit(case.drawn, form)] for case in cases]
    return [make_text_picture(case.prompt, seed=first_seed + index, units=units[index]) for index, case in enumerate(cases)]


@dataclass(frozen=True, slots=True)
class OutlineScore:
    hollow: float  # mean over the picture's objects; 0 if there are none
    outlined: bool  # every object is outlined
    objects: bool  # color and shape of every object, none missing, none extra


def score_outlined(scene: Scene, picture: Image.Image) -> OutlineScore:
    found = judge_picture(picture).findings
    right = Counter((thing.colour, thing.shape) for thing in scene.things) == Counter((one.colour, one.shape) for one in found)
    hollow = sum(one.hollow for one in found) / max(1, len(found))
    return OutlineScore(hollow, bool(found) and all(one.outlined for one in found), right)


def draw_outline_cases(num_cases: int, *, seed: int = 654) -> list[tuple[Scene, str]]:
    """Prompts with one and two objects, alternating."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, two_things_share=float(index % 2)) for index in range(num_cases)]
    return [(scene, describe_scene(scene, rng, full=True)) for scene in scenes]


def evaluate_guides(*, num_cases: int = 50) -> tuple[str, Image.Image]:
    """Two Markdown tables, and a contact sheet with ten pictures per row: without a unit, with each form of unit, without the LoRA, with it."""
    cases, prompts = draw_guide_cases(num_cases), draw_outline_cases(num_cases)
    fields = ("follows", "shape", "place", "colour", "background")
    lines = [f"| outline | {' | '.join(fields)} |", "|---|---|---|---|---|---|"]
    shown: list[Image.Image] = []
    with installed_product(guides=(DEMO_CONTROLNET, DEMO_LORA)):
        for form in (None, *FORMS):
            pictures = make_guided(cases, form)
            scores = [score_guided(case, picture) for case, picture in zip(cases, pictures, strict=True)]
            shares = [sum(getattr(score, name) for score in scores) / num_cases for name in fields]
            lines.append(f"| {form or 'none'} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
            shown += pictures[:10]
        lines += ["", "| prompt | hollow | outlined | objects |", "|---|---|---|---|"]
        for tag in ("", LORA_TAG):
            pictures = [make_text_picture(f"{prompt} {tag}".strip(), seed=1 + index) for index, (_, prompt) in enumerate(prompts)]
            outlined = [score_outlined(scene, picture) for (scene, _), picture in zip(prompts, pictures, strict=True)]
            shares = [sum(getattr(score, name) for score in outlined) / num_cases for name in ("hollow", "outlined", "objects")]
            lines.append(f"| {tag or 'without'} | {shares[0]:.2f} | {shares[1]:.0%} | {shares[2]:.0%} |")
            shown += pictures[:10]
    return "\n".join(lines), make_contact_sheet(shown)
