"""Maps of a picture that guide a ControlNet and need no network: edges, lines, blur, colors, shuffles. Input and output are uint8.

Pure array functions: must not know ControlNet, the page or files.

Shapes: H W rows and columns, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Picture = NDArray[np.uint8]

_TAN_22 = np.tan(np.pi / 8)
_AROUND = np.ones((3, 3), dtype=bool)
_BLUR_REACH = 3.0
"""Number of standard deviations at which a Gaussian is truncated."""
_XDOG_SIGMAS = (0.5, 5.0)
_LINEART_FLOOR, _LINEART_MEDIAN = 16.0, 127.0
_GRID_PX = 64
_SHUFFLE_REACH_PX = 256
_LUMA = (0.2126, 0.7152, 0.0722)


def find_edges(image_HWC: Picture, low: float, high: float) -> Picture:
    """White edges, one pixel wide, on black. Canny 1986, with 3x3 Sobel gradients and their L1 length: `low` ends an edge, `high` starts one.

    At each pixel, the channel with the steepest gradient is used.
    """
    low, high = sorted((low, high))
    dx_HW, dy_HW, length_HW = _steepest_gradients(image_HWC)
    ridge_HW = _is_ridge(dx_HW, dy_HW, length_HW) & (length_HW > low)
    labels_HW, _ = ndimage.label(ridge_HW, structure=_AROUND)
    strong = np.unique(labels_HW[ridge_HW & (length_HW > high)])
    return _as_picture(np.isin(labels_HW, strong[strong > 0]) * 255.0)


def _steepest_gradients(image_HWC: Picture) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    values_HWC = image_HWC.astype(np.float64).reshape(*image_HWC.shape[:2], -1)
    dx_HWC, dy_HWC = (_sobel(values_HWC, along=axis) for axis in (1, 0))
    length_HWC = np.abs(dx_HWC) + np.abs(dy_HWC)
    best_HW1 = length_HWC.argmax(axis=2)[..., None]
    dx_HW, dy_HW, length_HW = (np.take_along_axis(one, best_HW1, axis=2)[..., 0] for one in (dx_HWC, dy_HWC, length_HWC))
    return dx_HW, dy_HW, length_HW


def _sobel(values_HWC: NDArray[np.float64], *, along: int) -> NDArray[np.float64]:
    """Unlike SciPy's, does not smooth across channels."""
    slope_HWC = ndimage.correlate1d(values_HWC, (-1, 0, 1), axis=along, mode="nearest")
    smooth_HWC: NDArray[np.float64] = ndimage.correlate1d(slope_HWC, (1, 2, 1), axis=1 - along, mode="nearest")
    return smooth_HWC


def _is_ridge(dx_HW: NDArray[np.float64], dy_HW: NDArray[np.float64], length_HW: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the gradient is longer than at both neighbors along it; of two equal neighbors in a row or column, the first one counts."""
    height, width = length_HW.shape
    padded = np.pad(length_HW, 1)

    def shifted(rows: int, columns: int) -> NDArray[np.float64]:
        return padded[1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    flat, steep = np.abs(dy_HW) < _TAN_22 * np.abs(dx_HW), np.abs(dy_HW) > (_TAN_22 + 2) * np.abs(dx_HW)
    along_x = (length_HW > shifted(0, -1)) & (length_HW >= shifted(0, 1))
    along_y = (length_HW > shifted(-1, 0)) & (length_HW >= shifted(1, 0))
    falling = (length_HW > shifted(-1, -1)) & (length_HW > shifted(1, 1))
    rising = (length_HW > shifted(-1, 1)) & (length_HW > shifted(1, -1))
    result: NDArray[np.bool_] = np.where(flat, along_x, np.where(steep, along_y, np.where(dx_HW * dy_HW < 0, rising, falling)))
    return result


def invert(image_HWC: Picture) -> Picture:
    """The negative."""
    return _as_picture(255.0 - image_HWC)


def threshold(image_HWC: Picture, value: float) -> Picture:
    """White where every channel is above `value`."""
    return _as_picture((image_HWC.min(axis=2) > value) * 255.0)


def blur(image_HWC: Picture, sigma_px: float) -> Picture:
    """A Gaussian blur."""
    return _as_picture(_blurred(image_HWC, sigma_px))


def shrink(image_HWC: Picture, rate: float) -> Picture:
    """The picture at 1/rate of its size, by averaging."""
    height, width = image_HWC.shape[:2]
    size = max(1, round(width / rate)), max(1, round(height / rate))
    return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BOX))


def find_scribble(image_HWC: Picture, value: float) -> Picture:
    """White lines where some channel is darker than its surroundings: a difference of Gaussians (Winnemoeller 2011), thresholded."""
    fine_HWC, coarse_HWC = (_blurred(image_HWC, sigma) for sigma in _XDOG_SIGMAS)
    darker_HW = (coarse_HWC - fine_HWC).min(axis=2).clip(0, 255).astype(np.uint8)
    return _as_picture((2.0 * darker_HW > value) * 255.0)


def find_lines(image_HWC: Picture, sigma_px: float, floor: float) -> Picture:
    """Lines, brighter the darker they are compared to their surroundings, scaled so that the median above `floor` is mid-gray."""
    darker_HW = (_blurred(image_HWC, sigma_px) - image_HWC).min(axis=2).clip(0, 255)
    clear = darker_HW[darker_HW > floor]
    return _as_picture(darker_HW / max(_LINEART_FLOOR, float(np.median(clear)) if clear.size else 0.0) * _LINEART_MEDIAN)


def take_luminance(image_HWC: Picture, gamma: float) -> Picture:
    """Lightness L* (CIE 1976) of sRGB colors as gray, to the power `gamma`."""
    linear_HWC = image_HWC / 255.0
    linear_HWC = np.where(linear_HWC <= 0.04045, linear_HWC / 12.92, ((linear_HWC + 0.055) / 1.055) ** 2.4)
    y_HW = linear_HWC @ np.asarray(_LUMA)
    lightness_HW = np.where(y_HW > 0.008856, 1.16 * np.cbrt(y_HW) - 0.16, 9.033 * y_HW)
    return _as_picture(lightness_HW.clip(0, 1) ** gamma * 255.0)


def take_intensity(image_HWC: Picture, gamma: float) -> Picture:
    """The maximum of the three color channels (HSV's value) as gray, to the power `gamma`."""
    return _as_picture((image_HWC.max(axis=2) / 255.0) ** gamma * 255.0)


def make_color_grid(image_HWC: Picture) -> Picture:
    """Squares of 64 pixels in their mean colors."""
    height, width = image_HWC.shape[:2]
    image = Image.fromarray(image_HWC)
    small = image.resize((max(1, width // _GRID_PX), max(1, height // _GRID_PX)), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def shuffle(image_HWC: Picture, seed: int = 0) -> Picture:
    """The picture warped by two smooth random fields that give each pixel's source position. Deterministic per seed."""
    height, width = image_HWC.shape[:2]
    generator = np.random.default_rng(seed)
    rows_HW, columns_HW = (_smooth_field(generator, height, width) for _ in range(2))
    places = np.stack([rows_HW * (height - 1), columns_HW * (width - 1)])
    return np.stack([_as_grey(ndimage.map_coordinates(image_HWC[..., c].astype(np.float64), places, order=1)) for c in range(3)], axis=2)


def _smooth_field(generator: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Random numbers 0..1 that vary over about 256 pixels."""
    rows, columns = 4 + height // _SHUFFLE_REACH_PX, 4 + width // _SHUFFLE_REACH_PX
    coarse = Image.fromarray(generator.random((rows, columns)).astype(np.float32))
    field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    span = field.max() - field.min()
    result: NDArray[np.float64] = (field - field.min()) / (span if span > 0 else 1.0)
    return result


def _blurred(image_HWC: Picture, sigma_px: float) -> NDArray[np.float64]:
    blurred: NDArray[np.float64] = ndimage.gaussian_filter(image_HWC.astype(np.float64), (sigma_px, sigma_px, 0), mode="mirror", truncate=_BLUR_REACH)
    return blurred


def _as_grey(values_HW: NDArray[Any]) -> Picture:
    return np.rint(values_HW).clip(0, 255).astype(np.uint8)


def _as_picture(values: NDArray[Any]) -> Picture:
    """Expand gray to three equal channels; round to integers 0..255."""
    rounded = _as_grey(values)
    return np.repeat(rounded[..., None], 3, axis=2) if rounded.ndim == 2 else rounded
