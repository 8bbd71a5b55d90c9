"""Training data for the demo checkpoint's ControlNet: scenes at any place, their hints, and captions that may name another place or shape.

Draws on all cores; nothing here needs a device.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from modules_forge.image_maps import find_edges
from tools.demo_model.scenes import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    SHAPES,
    SIDE_PX,
    Scene,
    Thing,
    describe_scene,
    draw_scene,
    outline_points,
    sample_scene,
    thing_box,
)

MAX_SHIFT = 0.14  # of the side; half the distance between cells
MIN_RIM = 0.03  # of the side, kept free around an object
CANNY_THRESHOLDS = (100, 200)  # the product's own
CHUNK = 250


@dataclass(frozen=True, slots=True)
class GuidedCase:
    """A scene as drawn, and a caption of it that may name another place or shape."""

    scene: Scene
    caption: str
    hint_kind: str  # of HINT_KINDS


HINT_KINDS = ("canny of a filled drawing", "canny of a line drawing", "white lines on black")


def move_anywhere(scene: Scene, rng: random.Random) -> Scene:
    """The scene with its things moved by up to half the distance to the next cell, inside the picture; two things keep their gap."""
    limit = MAX_SHIFT if len(scene.things) == 1 else 0.04
    jitter: list[float] = []
    for thing in scene.things:
        x, y, half = thing_box(thing, (0.0, 0.0), 1)
        reach = half * 1.08 + MIN_RIM
        jitter += [min(max(centre + rng.uniform(-limit, limit), reach), 1 - reach) - centre for centre in (x, y)]
    return replace(scene, jitter=(*jitter, *(0.0,) * (4 - len(jitter))))


def misplace(scene: Scene, rng: random.Random, *, wrong_shape_share: float = 0.25) -> Scene:
    """A different scene for the caption: other places, sometimes other shapes; colors and background stay correct."""
    shapes = [rng.choice(SHAPES) if rng.random() < wrong_shape_share else thing.shape for thing in scene.things]
    if scene.relation is None:
        thing = scene.things[0]
        elsewhere = rng.choice([cell for cell in CELLS if cell != thing.cell])
        return replace(scene, things=(replace(thing, cell=elsewhere, shape=shapes[0]),))
    things = tuple(replace(thing, shape=shape) for thing, shape in zip(scene.things, shapes, strict=True))
    return replace(scene, things=things)


def sample_case(rng: random.Random, *, misplaced_share: float = 0.8) -> GuidedCase:
    """A random case. One in ten captions is empty; `misplaced_share` of them name a wrong place."""
    scene = move_anywhere(sample_scene(rng, two_things_share=0.25), rng)
    kind = rng.choices(HINT_KINDS, (0.4, 0.3, 0.3))[0]
    if rng.random() < 0.1:
        return GuidedCase(scene, "", kind)
    said = misplace(scene, rng) if rng.random() < misplaced_share else scene
    return GuidedCase(scene, describe_scene(said, rng), kind)


def draw_lines(scene: Scene, *, width_px: float, ink: tuple[int, int, int], paper: tuple[int, int, int], side_px: int = SIDE_PX) -> Image.Image:
    """The outlines of a scene's things as a line drawing."""
    oversample = 4
    big_px = side_px * oversample
    image = Image.new("RGB", (big_px, big_px), paper)
    draw = ImageDraw.Draw(image)
    for index, thing in enumerate(scene.things):
        x, y, half = thing_box(thing, (scene.jitter[2 * index], scene.jitter[2 * index + 1]), big_px)
        points = outline_points(thing.shape, x, y, half)
        draw.line([*points, *points[:2]], fill=ink, width=round(width_px * oversample), joint="curve")
    return image.resize((side_px, side_px), Image.Resampling.BOX)


def draw_hint(scene: Scene, kind: str, rng: random.Random) -> np.ndarray:
    """(64, 64) uint8, 0 or 255: a ControlNet unit's hint for a drawing of the scene."""
    white, black = (255, 255, 255), (0, 0, 0)
    ink, paper = rng.choice(((white, black), (black, white)))
    if kind == "white lines on black":
        lines = np.asarray(draw_lines(scene, width_px=rng.uniform(1.0, 2.0), ink=white, paper=black))[..., 0]
        return np.where(lines > rng.randint(70, 127), 255, 0).astype(np.uint8)
    if kind == "canny of a line drawing":
        picture = draw_lines(scene, width_px=rng.uniform(1.0, 3.0), ink=ink, paper=paper)
    elif rng.random() < 0.5:
        picture = draw_scene(scene, SIDE_PX)
    else:
        picture = draw_scene(recolour(scene, rng), SIDE_PX)
    return find_edges(np.asarray(picture), *CANNY_THRESHOLDS)[..., 0]


def recolour(scene: Scene, rng: random.Random) -> Scene:
    """The scene in random colors, which a hint does not show."""
    things: tuple[Thing, ...] = tuple(replace(thing, colour=rng.choice(list(COLOURS))) for thing in scene.things)
    return replace(scene, things=things, background=rng.choice(list(BACKGROUNDS)))


def _draw_chunk(task: tuple[list[GuidedCase], int, bool]) -> tuple[np.ndarray, np.ndarray]:
    cases, seed, outline_only = task
    rng = random.Random(seed)
    pictures = np.stack([np.asarray(draw_scene(case.scene, SIDE_PX, outline_only=outline_only)) for case in cases])
    if outline_only:
        return pictures, np.zeros((0,), dtype=np.uint8)
    return pictures, np.stack([draw_hint(case.scene, case.hint_kind, rng) for case in cases])


def draw_cases(cases: list[GuidedCase], *, seed: int, outline_only: bool = False, num_workers: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 64, 64, 3) and hints (N, 64, 64), uint8, drawn by `num_workers` processes. `outline_only`: hollow shapes, no hints."""
    tasks = [(cases[first : first + CHUNK], seed + first, outline_only) for first in range(0, len(cases), CHUNK)]
    workers = min(num_workers or os.cpu_count() or 1, len(tasks))
    if workers == 1:
        parts = [_draw_chunk(task) for task in tasks]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = list(pool.map(_draw_chunk, tasks))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
