"""Crops of pictures: around what is most interesting in them, and into overlapping parts of one shape. Knows no page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

NUM_CORNERS = 100
CORNER_DISTANCE = 0.06
"""Least distance of two corners, in shorter sides."""
ENTROPY_STEPS = 16
"""Places of the window along the side that is cut."""
ENTROPY_BINS = 64


@dataclass(frozen=True, slots=True)
class Point:
    """A place of interest in pixels, and how much it counts."""

    x: float
    y: float
    weight: float


def find_corners(gray: np.ndarray, count: int = NUM_CORNERS) -> list[tuple[int, int]]:
    """(x, y) of the strongest corners. Shi and Tomasi 1994: where the smaller eigenvalue of the structure tensor is large."""
    across, down = ndimage.sobel(gray, axis=1), ndimage.sobel(gray, axis=0)
    xx, yy, xy = (ndimage.gaussian_filter(product, 1.5) for product in (across * across, down * down, across * down))
    strength = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    reach = max(1, int(min(gray.shape) * CORNER_DISTANCE))
    peaks = (strength == ndimage.maximum_filter(strength, size=2 * reach + 1)) & (strength > 0.01 * strength.max())
    rows, columns = peaks.nonzero()
    order = np.argsort(-strength[rows, columns])[:count]
    return [(int(columns[one]), int(rows[one])) for one in order]


def entropy_of(gray: np.ndarray) -> float:
    """Bits of a picture's brightness (0..255)."""
    counts, _ = np.histogram(gray, bins=ENTROPY_BINS, range=(0, 256))
    shares = counts[counts > 0] / gray.size
    return float(-(shares * np.log2(shares)).sum())


def most_entropic_place(gray: np.ndarray, size_px: tuple[int, int]) -> tuple[float, float]:
    """The center of the window of `size_px` (width, height) with the most entropy, slid along both sides."""
    height, width = gray.shape
    starts = [
        (top, left)
        for top in sorted({int(one) for one in np.linspace(0, height - size_px[1], ENTROPY_STEPS)})
        for left in sorted({int(one) for one in np.linspace(0, width - size_px[0], ENTROPY_STEPS)})
    ]
    top, left = max(starts, key=lambda start: entropy_of(gray[start[0] : start[0] + size_px[1], start[1] : start[1] + size_px[0]]))
    return left + size_px[0] / 2, top + size_px[1] / 2


def find_faces(image: Image.Image) -> list[tuple[float, float, float]]:
    """(x, y, area) of faces, by OpenCV's cascade; none without that package."""
    try:
        import cv2  # optional
    except ImportError:
        return []
    cascade = cv2.CascadeClassifier(cv2.data.haarcascades + "haarcascade_frontalface_default.xml")
    least = max(1, int(min(image.size) * 0.05))
    found = cascade.detectMultiScale(np.asarray(image.convert("L")), scaleFactor=1.1, minNeighbors=7, minSize=(least, least))
    return [(x + width / 2, y + height / 3, float(width * height)) for x, y, width, height in found]


def points_of_interest(image: Image.Image, crop_px: tuple[int, int], *, face: float, entropy: float, edges: float) -> list[Point]:
    """One point for each kind that was found: the mean of the faces by area, the mean of the corners, and the most entropic window."""
    gray, points = np.asarray(image.convert("L"), dtype=np.float64), []
    faces = find_faces(image) if face > 0 else []
    if faces:
        total = sum(area for _, _, area in faces)
        points.append(Point(sum(x * area for x, _, area in faces) / total, sum(y * area for _, y, area in faces) / total, face))
    corners = find_corners(gray) if edges > 0 else []
    if corners:
        points.append(Point(*(sum(one[axis] for one in corners) / len(corners) for axis in (0, 1)), edges))
    if entropy > 0:
        points.append(Point(*most_entropic_place(gray, crop_px), entropy))
    return points


def focal_point(points: Sequence[Point], size_px: tuple[int, int]) -> tuple[float, float]:
    """The weighted mean; the middle of the picture without points."""
    total = sum(point.weight for point in points)
    if total == 0:
        return size_px[0] / 2, size_px[1] / 2
    return sum(point.x * point.weight for point in points) / total, sum(point.y * point.weight for point in points) / total


def crop_around_focus(
    image: Image.Image, target_px: tuple[int, int], *, face: float, entropy: float, edges: float, marks: bool = False
) -> tuple[Image.Image, Image.Image | None]:
    """The picture scaled to cover `target_px` and cut to it around its focal point; with `marks` also the whole picture with what was found."""
    scale = max(target_px[0] / image.width, target_px[1] / image.height)
    image = image.resize((max(target_px[0], round(image.width * scale)), max(target_px[1], round(image.height * scale))), Image.Resampling.LANCZOS)
    points = points_of_interest(image, target_px, face=face, entropy=entropy, edges=edges)
    x, y = focal_point(points, image.size)
    left = min(max(0, round(x - target_px[0] / 2)), image.width - target_px[0])
    top = min(max(0, round(y - target_px[1] / 2)), image.height - target_px[1])
    box = (left, top, left + target_px[0], top + target_px[1])
    return image.crop(box), _marked(image, points, (x, y), box) if marks else None


def _marked(image: Image.Image, points: Sequence[Point], focus: tuple[float, float], box: tuple[int, int, int, int]) -> Image.Image:
    marked = image.convert("RGB")
    draw, radius = ImageDraw.Draw(marked), max(3, min(image.size) // 30)
    for point in points:
        draw.ellipse((point.x - radius, point.y - radius, point.x + radius, point.y + radius), outline="red", width=2)
    draw.ellipse((focus[0] - radius, focus[1] - radius, focus[0] + radius, focus[1] + radius), outline="lime", width=2)
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="white", width=2)
    return marked


def split_picture(image: Image.Image, target_px: tuple[int, int], *, threshold: float, overlap: float) -> list[Image.Image]:
    """Parts of `target_px` along the side that is too long, overlapping by at least the share `overlap`; the picture itself if it is short enough.

    `threshold`: how many times as long as the target's the longer side's share must be, as 1 - threshold (0.5: twice).
    """
    relation = (image.height * target_px[0]) / (image.width * target_px[1])
    is_wide = relation < 1
    if min(relation, 1 / relation) >= 1 - threshold:
        return [image]
    if is_wide:
        image = image.resize((max(target_px[0], image.width * target_px[1] // image.height), target_px[1]), Image.Resampling.LANCZOS)
    else:
        image = image.resize((target_px[0], max(target_px[1], image.height * target_px[0] // image.width)), Image.Resampling.LANCZOS)
    length, side = (image.width, target_px[0]) if is_wide else (image.height, target_px[1])
    count = max(1, math.ceil((length - side * overlap) / (side * (1 - overlap))))
    starts = [round(number * (length - side) / (count - 1)) for number in range(count)] if count > 1 else [0]
    boxes = [(start, 0, start + side, target_px[1]) if is_wide else (0, start, target_px[0], start + side) for start in starts]
    return [image.crop(box) for box in boxes]
