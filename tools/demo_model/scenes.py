"""The demo checkpoint's world: colored shapes, their pictures and captions.

A `Scene` is one or two objects on a plain background. `draw_scene` renders it, `describe_scene` describes it in one of many ways. Nothing
here is shared with `judge.py`, which analyzes pictures by other means.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIDE_PX = 64
COLOURS = {
    "red": (220, 30, 35),
    "green": (30, 160, 50),
    "blue": (35, 70, 215),
    "yellow": (245, 220, 40),
    "purple": (135, 40, 165),
    "orange": (245, 130, 25),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (140, 140, 140), "black": (15, 15, 15), "cyan": (150, 225, 240)}
SHAPES = ("circle", "square", "triangle", "cross")
# half of the height, as a fraction of the picture's height
SIZES = {"small": 0.12, "medium": 0.165, "large": 0.21}
# cell of a 3x3 grid (column, row) -> phrases for it
CELLS = {
    (0, 0): ("in the top left corner", "in the top left"),
    (1, 0): ("at the top",),
    (2, 0): ("in the top right corner", "in the top right"),
    (0, 1): ("on the left",),
    (1, 1): ("in the center", "in the middle"),
    (2, 1): ("on the right",),
    (0, 2): ("in the bottom left corner", "in the bottom left"),
    (1, 2): ("at the bottom",),
    (2, 2): ("in the bottom right corner", "in the bottom right"),
}
# relation of the first object to the second -> (cell of the first, cell of the second)
RELATIONS = {
    "left of": ((0, 1), (2, 1)),
    "right of": ((2, 1), (0, 1)),
    "above": ((1, 0), (1, 2)),
    "below": ((1, 2), (1, 0)),
}
PREFIXES = ("", "", "", "", "a picture of ", "a drawing of ", "a photo of ")


@dataclass(frozen=True, slots=True)
class Thing:
    colour: str
    shape: str
    extent: str  # a key of SIZES
    cell: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    relation: str | None = None  # set if there are two things
    jitter: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)  # dx, dy per thing, fraction of the picture's side


def is_held_out(colour: str, shape: str, cell: tuple[int, int]) -> bool:
    """Whether this color-shape-place is held out of training: about one in nine, evenly over colors, shapes and cells."""
    colour_index, shape_index = list(COLOURS).index(colour), SHAPES.index(shape)
    return (colour_index * 2 + shape_index * 5 + cell[0] + 3 * cell[1]) % 9 == 4


def sample_scene(rng: random.Random, *, two_things_share: float = 0.5, held_out: bool = False) -> Scene:
    """A random scene. With `held_out`, at least one of its things is a held-out combination; without it, none is."""
    while True:
        scene = _sample_any_scene(rng, two_things_share)
        if any(is_held_out(t.colour, t.shape, t.cell) for t in scene.things) == held_out:
            return scene


def _sample_any_scene(rng: random.Random, two_things_share: float) -> Scene:
    jitter = tuple(rng.uniform(-0.03, 0.03) for _ in range(4))
    background = rng.choice(list(BACKGROUNDS))
    if rng.random() >= two_things_share:
        thing = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(SIZES)), rng.choice(list(CELLS)))
        return Scene((thing,), background, jitter=jitter)
    relation = rng.choice(list(RELATIONS))
    things = tuple(Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(SIZES)), cell) for cell in RELATIONS[relation])
    return Scene(things, background, relation, jitter)


def _say_thing(thing: Thing, say_extent: bool) -> str:
    words = [thing.extent] if say_extent else []
    words += [thing.colour, thing.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def describe_scene(scene: Scene, rng: random.Random, *, full: bool = False) -> str:
    """One caption of the scene. `full` always includes place and background; otherwise each may be omitted."""
    say_extents = [thing.extent != "medium" or rng.random() < 0.3 for thing in scene.things]
    first = _say_thing(scene.things[0], say_extents[0])
    if scene.relation is None:
        place = rng.choice(CELLS[scene.things[0].cell])
        body = f"{first} {place}" if full or rng.random() < 0.75 else first
    else:
        second = _say_thing(scene.things[1], say_extents[1])
        joiner = rng.choice((f"{scene.relation}", f"{scene.relation}", f"to the {scene.relation}")) if "of" in scene.relation else scene.relation
        body = f"{first} {joiner} {second}" if full or rng.random() < 0.9 else f"{first} and {second}"
    if full or rng.random() < 0.85:
        article = "an" if scene.background[0] in "aeiou" else "a"
        body += f" on {article} {scene.background} background"
    prefix = rng.choice(PREFIXES)
    return prefix + body


def thing_box(thing: Thing, jitter: tuple[float, float], side_px: int) -> tuple[float, float, float]:
    """Center x, center y and half height of a thing, in pixels."""
    half = SIZES[thing.extent]
    centre = []
    for axis in (0, 1):
        low, high = half + 0.05, 1 - half - 0.05
        centre.append((low + (high - low) * thing.cell[axis] / 2 + jitter[axis]) * side_px)
    return centre[0], centre[1], half * side_px


def outline_points(shape: str, x: float, y: float, half: float) -> list[tuple[float, float]]:
    """The corners of a shape, clockwise from the top left."""
    if shape == "square":
        half *= 0.92
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape == "triangle":
        return [(x, y - half), (x + half * 1.08, y + half), (x - half * 1.08, y + half)]
    if shape == "cross":
        arm = half * 0.36
        signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        points: list[tuple[float, float]] = []
        for sx, sy in signs:
            near_y, near_x = (x + sx * arm, y + sy * half), (x + sx * half, y + sy * arm)
            corner = (x + sx * arm, y + sy * arm)
            points += [near_y, corner, near_x] if sx * sy < 0 else [near_x, corner, near_y]
        return points
    steps = 64
    return [(x + half * math.cos(2 * math.pi * k / steps), y + half * math.sin(2 * math.pi * k / steps)) for k in range(steps)]


def draw_scene(scene: Scene, side_px: int = 64, *, oversample: int = 4, outline_only: bool = False) -> Image.Image:
    """The picture of a scene, RGB, antialiased. `outline_only` draws unfilled shapes (data for the outline LoRA)."""
    big_px = side_px * oversample
    image = Image.new("RGB", (big_px, big_px), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for index, thing in enumerate(scene.things):
        x, y, half = thing_box(thing, (scene.jitter[2 * index], scene.jitter[2 * index + 1]), big_px)
        points = outline_points(thing.shape, x, y, half)
        if outline_only:
            draw.line([*points, *points[:2]], fill=COLOURS[thing.colour], width=round(big_px * 0.045), joint="curve")
        else:
            draw.polygon(points, fill=COLOURS[thing.colour])
    return image.resize((side_px, side_px), Image.Resampling.BOX)
