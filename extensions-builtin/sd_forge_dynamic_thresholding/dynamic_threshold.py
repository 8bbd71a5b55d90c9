"""Dynamic thresholding of guidance: values as spread out as those of a lower CFG scale, with the detail of the high one. Knows no page.

Sources: Saharia et al., "Photorealistic Text-to-Image Diffusion Models" (Imagen, 2022), section 2.3; Alex Goodwin ("mcmonkey"),
sd-dynamic-thresholding (2023), for the mimicked scale, the modes and their names.

Shapes: B pictures, C channels, N latent places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAST_TIMESTEP = 999
MODES: Mapping[str, Callable[[float, float], float]] = {
    "Constant": lambda progress, value: 1.0,
    "Linear Down": lambda progress, value: 1.0 - progress,
    "Cosine Down": lambda progress, value: math.cos(progress * math.pi / 2),
    "Half Cosine Down": lambda progress, value: math.cos(progress),
    "Linear Up": lambda progress, value: progress,
    "Cosine Up": lambda progress, value: 1.0 - math.cos(progress * math.pi / 2),
    "Half Cosine Up": lambda progress, value: 1.0 - math.cos(progress),
    "Power Up": lambda progress, value: progress**value,
    "Power Down": lambda progress, value: 1.0 - progress**value,
    "Linear Repeating": lambda progress, value: abs(1.0 - 2.0 * ((progress * value) % 1.0)),
    "Cosine Repeating": lambda progress, value: (1.0 + math.cos(2 * math.pi * progress * value)) / 2,
    "Sawtooth": lambda progress, value: (progress * value) % 1.0,
}
"""Share of a scale above its minimum by progress (0 at the most noise, 1 at the least) and "Sched Val"."""
STARTPOINTS, MEASURES = ("MEAN", "ZERO"), ("AD", "STD")


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicThreshold:
    """The values of the panel, in its words."""

    mimic_scale: float = 7.0
    threshold_percentile: float = 1.0
    mimic_mode: str = "Constant"
    mimic_scale_min: float = 0.0
    cfg_mode: str = "Constant"
    cfg_scale_min: float = 0.0
    sched_val: float = 1.0
    separate_feature_channels: bool = True
    scaling_startpoint: str = "MEAN"
    variability_measure: str = "AD"
    interpolate_phi: float = 1.0

    def guide(self, cond: Tensor, uncond: Tensor, cfg_scale: float, timestep: float) -> Tensor:
        """x0 (B, C, H, W) of both branches, guided. `timestep`: 999 is the most noise."""
        progress = (LAST_TIMESTEP - timestep) / LAST_TIMESTEP
        high = self._scale_at(progress, cfg_scale, self.cfg_scale_min, self.cfg_mode)
        low = self._scale_at(progress, self.mimic_scale, self.mimic_scale_min, self.mimic_mode)
        guided, mimicked = (uncond + (cond - uncond) * scale for scale in (high, low))
        result = self._spread_as(guided.flatten(2), mimicked.flatten(2)).view_as(guided)
        return torch.lerp(guided, result, self.interpolate_phi)

    def _scale_at(self, progress: float, scale: float, least: float, mode: str) -> float:
        return least + (scale - least) * MODES[mode](min(max(progress, 0.0), 1.0), self.sched_val)

    def _spread_as(self, guided_BCN: Tensor, mimicked_BCN: Tensor) -> Tensor:
        """`guided_BCN` with the spread of `mimicked_BCN` around its own means (MEAN) or around zero (ZERO)."""
        mean_BC1 = guided_BCN.mean(dim=2, keepdim=True)
        away_BCN = guided_BCN - mean_BC1
        wanted, have = self._spread(mimicked_BCN - mimicked_BCN.mean(dim=2, keepdim=True), 1.0), self._spread(away_BCN, self.threshold_percentile)
        if self.scaling_startpoint == "ZERO":
            return guided_BCN * _ratio(wanted, have)
        if self.variability_measure == "AD":
            have = torch.maximum(wanted, have)
            away_BCN = away_BCN.clamp(-have, have)
        return mean_BC1 + away_BCN * _ratio(wanted, have)

    def _spread(self, away_BCN: Tensor, percentile: float) -> Tensor:
        """Standard deviation, or the percentile of the distances from the mean; by channel, or one for all."""
        if self.variability_measure == "STD":
            return away_BCN.std(dim=2, keepdim=True) if self.separate_feature_channels else away_BCN.std()
        distances = away_BCN.abs()
        distances = distances if self.separate_feature_channels else distances.reshape(1, 1, -1)
        return _quantile(distances, percentile)


def _quantile(values_BCN: Tensor, percentile: float) -> Tensor:
    """(B, C, 1), interpolated between neighbors. torch.quantile stops at 16 million values; sorting does not."""
    if percentile >= 1.0:
        return values_BCN.amax(dim=2, keepdim=True)
    sorted_BCN, place = values_BCN.sort(dim=2).values, percentile * (values_BCN.shape[2] - 1)
    low = math.floor(place)
    high = min(low + 1, values_BCN.shape[2] - 1)
    return torch.lerp(sorted_BCN[..., low : low + 1], sorted_BCN[..., high : high + 1], place - low)


def _ratio(wanted: Tensor, have: Tensor) -> Tensor:
    return torch.where(have > 0, wanted / torch.where(have > 0, have, torch.ones_like(have)), torch.ones_like(have))
