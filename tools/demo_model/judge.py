"""An independent judge: says what is in a picture by classical image analysis.

It shares no code with the renderer and nothing is learned: background from the picture's rim, objects by colour distance and connected components,
colour names by the nearest reference in CIELAB, shapes by solidity (area over convex hull) and extent (area over bounding box).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

# sRGB references of the colour words
OBJECT_COLOURS = {
    "red": (215, 30, 40),
    "green": (35, 155, 55),
    "blue": (40, 75, 210),
    "yellow": (240, 215, 50),
    "purple": (130, 45, 160),
    "orange": (240, 130, 35),
}
BACKGROUND_COLOURS = {"white": (250, 250, 250), "grey": (140, 140, 140), "black": (15, 15, 15), "cyan": (150, 225, 240)}
UPSCALE = 4
MIN_AREA_PART = 0.008  # of the picture
FOREGROUND_DISTANCE = 24.0  # CIELAB, from the background


@dataclass(frozen=True, slots=True)
class Finding:
    colour: str
    shape: str
    x: float  # centre, part of the width
    y: float
    area: float  # part of the picture
    outlined: bool  # hollow inside


@dataclass(frozen=True, slots=True)
class Verdict:
    background: str
    findings: tuple[Finding, ...]  # largest first


def srgb_to_lab(rgb_HWC: np.ndarray) -> np.ndarray:
    """sRGB 0..255 to CIELAB under D65 (IEC 61966-2-1, CIE 15)."""
    value = np.asarray(rgb_HWC, dtype=np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])], -1)


def _nearest(lab: np.ndarray, references: dict[str, tuple[int, int, int]]) -> np.ndarray:
    table = srgb_to_lab(np.array(list(references.values())))
    return np.linalg.norm(lab[..., None, :] - table, axis=-1).argmin(-1)


def judge_picture(image: Image.Image) -> Verdict:
    """Background and objects of an RGB picture of any size."""
    big = image.convert("RGB").resize((image.width * UPSCALE, image.height * UPSCALE), Image.Resampling.BICUBIC)
    lab_HWC = srgb_to_lab(np.asarray(big))
    rim_px = UPSCALE * 2
    rim = np.concatenate([part.reshape(-1, 3) for part in (lab_HWC[:rim_px], lab_HWC[-rim_px:], lab_HWC[:, :rim_px], lab_HWC[:, -rim_px:])])
    background_lab = np.median(rim, axis=0)
    background = list(BACKGROUND_COLOURS)[int(_nearest(background_lab, BACKGROUND_COLOURS))]
    foreground_HW = np.linalg.norm(lab_HWC - background_lab, axis=-1) > FOREGROUND_DISTANCE
    return Verdict(background, tuple(_find_objects(lab_HWC, background_lab, foreground_HW)))


def _find_objects(lab_HWC: np.ndarray, background_lab: np.ndarray, foreground_HW: np.ndarray) -> list[Finding]:
    colour_HW = np.where(foreground_HW, _nearest(lab_HWC, OBJECT_COLOURS), -1)
    core = np.zeros(foreground_HW.shape, dtype=int)
    names: list[str] = []
    for index, name in enumerate(OBJECT_COLOURS):
        # opening removes the thin bands where an edge passes through another colour
        opened = ndimage.binary_opening(colour_HW == index, np.ones((3, 3)), iterations=UPSCALE // 2)
        labels, count = ndimage.label(opened)
        for label in range(1, count + 1):
            part = labels == label
            if part.sum() >= MIN_AREA_PART * part.size:
                names.append(name)
                core[part] = len(names)
    if not names:
        return []
    nearest = ndimage.distance_transform_edt(core == 0, return_distances=False, return_indices=True)
    owner_HW = core[tuple(nearest)]
    findings = []
    for number, name in enumerate(names, 1):
        object_lab = np.median(lab_HWC[core == number], axis=0)
        axis = object_lab - background_lab
        cover_HW = (lab_HWC - background_lab) @ axis / (axis @ axis)
        mask = ndimage.binary_opening((owner_HW == number) & (cover_HW > 0.5) & foreground_HW)
        labels, count = ndimage.label(mask)
        if count:
            sizes = ndimage.sum_labels(mask, labels, range(1, count + 1))
            findings.append(_measure(labels == int(np.argmax(sizes)) + 1, name))
    return sorted(findings, key=lambda finding: -finding.area)


def _measure(mask_HW: np.ndarray, colour: str) -> Finding:
    filled = ndimage.binary_fill_holes(mask_HW)
    area = float(filled.sum())
    rows, columns = np.nonzero(filled)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    corners = np.concatenate([np.stack([columns + dx, rows + dy], 1) for dx in (0, 1) for dy in (0, 1)])
    try:
        hull_area = ConvexHull(corners).volume
    except QhullError:
        hull_area = area
    shape = _name_shape(solidity=area / hull_area, extent=area / (height * width))
    height_px, width_px = mask_HW.shape
    hollow = 1 - mask_HW.sum() / area
    return Finding(colour, shape, float(columns.mean() / width_px), float(rows.mean() / height_px), area / mask_HW.size, bool(hollow > 0.15))


def _name_shape(*, solidity: float, extent: float) -> str:
    """Ideal values: square 1 and 1, circle 1 and 0.785, triangle 1 and 0.5, plus-shaped cross 0.74 and 0.59."""
    if solidity < 0.86:
        return "cross"
    if extent > 0.89:
        return "square"
    return "circle" if extent > 0.645 else "triangle"
