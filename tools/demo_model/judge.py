"""An independent judge: determines what a picture shows by classical image analysis.

It shares no code with the renderer and uses no learning: the background from the picture's border, objects by color distance and connected
components, color names by the nearest reference in CIELAB, shapes by Fourier descriptors of the outline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

# sRGB references of the color words
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
NUM_ANGLES = 120
MIN_AREA_PART = 0.008  # of the picture
FOREGROUND_DISTANCE = 24.0  # CIELAB, from the background
MIN_HOLLOW = 0.15  # of an outlined object


@dataclass(frozen=True, slots=True)
class Finding:
    colour: str
    shape: str
    x: float  # center, as a fraction of the width
    y: float
    area: float  # fraction of the picture
    hollow: float  # fraction of the enclosed area that does not have the object's color

    @property
    def outlined(self) -> bool:
        return self.hollow > MIN_HOLLOW


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
        # opening removes thin bands where an edge passes through another color
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
    height_px, width_px = mask_HW.shape
    hollow = 1 - mask_HW.sum() / area
    shape = _name_shape(_radial_profile(filled, float(rows.mean()), float(columns.mean())))
    return Finding(colour, shape, float(columns.mean() / width_px), float(rows.mean() / height_px), area / mask_HW.size, float(hollow))


def _radial_profile(mask_HW: np.ndarray, y: float, x: float) -> np.ndarray:
    """Distance from the center of mass to the outline in `NUM_ANGLES` directions (from the right, clockwise), divided by the mean."""
    angles = np.arange(NUM_ANGLES) * 2 * np.pi / NUM_ANGLES
    radii = np.arange(0, float(max(mask_HW.shape)), 0.5)
    rows = np.rint(y + np.outer(np.sin(angles), radii)).astype(int)
    columns = np.rint(x + np.outer(np.cos(angles), radii)).astype(int)
    inside = (rows >= 0) & (rows < mask_HW.shape[0]) & (columns >= 0) & (columns < mask_HW.shape[1])
    hit = inside & mask_HW[rows.clip(0, mask_HW.shape[0] - 1), columns.clip(0, mask_HW.shape[1] - 1)]
    reach = np.where(hit, radii, 0).max(1)
    return reach / reach.mean()


def _name_shape(profile: np.ndarray) -> str:
    """The nearest of the four shapes, by Fourier descriptors of the outline's radius.

    Three corners give a strong third harmonic (0.27 for the ideal triangle). Four give a fourth: in phase with the axes for a cross, whose arms
    are there (0.28), in antiphase for a square, whose corners are between them (-0.14). A circle has neither.
    """
    spectrum = np.fft.rfft(profile) / len(profile) * 2
    third, fourth = abs(spectrum[3]), spectrum[4].real
    if third > 0.13 and third > abs(fourth):
        return "triangle"
    if fourth < -0.07:
        return "square"
    return "cross" if fourth > 0.1 else "circle"
