"""The latent modifier: changes what guidance adds, as velocity predictions, in each step. Knows no page.

Ideas and the panel's words: Clybius, ComfyUI-Latent-Modifiers (2023). Each picture is changed by its own numbers alone, so that it does not depend
on its batch. v is the velocity prediction (Salimans and Ho 2022): x0 = x / (s^2 + 1) - v s / sqrt(s^2 + 1) at noise level s.

Shapes: B pictures, C channels, H W latent rows and columns, N = H W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from latent_noise import add_as_cads, make_noise, without_strong_frequencies
from torch import Tensor
from torch.nn import functional

TIMESTEPS = 999.0
TINY = 1e-10
PICTURE, PLACES = (1, 2, 3), (2, 3)
"""Dims of one picture, and of one of its channels."""
BLUR_SIDE, BLUR_SIGMA = 13, 3.0
GATE_FLOOR, GATE_CEILING = 3.056, 42.0
"""Latents (in VAE units) above the ceiling are too bright to be decoded; what is thresholded stays above the floor. Birch-Labs 2023."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentModifier:
    """The values of the panel, in its words."""

    sharpness_multiplier: float = 0.0
    sharpness_method: str = "anisotropic"
    tonemap_multiplier: float = 0.0
    tonemap_method: str = "reinhard"
    tonemap_percentile: float = 100.0
    contrast_multiplier: float = 0.0
    combat_method: str = "subtract"
    combat_cfg_drift: float = 0.0
    rescale_cfg_phi: float = 0.0
    extra_noise_type: str = "gaussian"
    extra_noise_method: str = "add"
    extra_noise_multiplier: float = 0.0
    extra_noise_lowpass: float = 100.0
    divisive_norm_size: float = 127.0
    divisive_norm_multiplier: float = 0.0
    spectral_mod_mode: str = "hard_clamp"
    spectral_mod_percentile: float = 5.0
    spectral_mod_multiplier: float = 0.0
    affect_uncond: str = "None"
    dyn_cfg_augmentation: str = "None"

    def guide(
        self, x: Tensor, cond_x0: Tensor, uncond_x0: Tensor, sigma: Tensor, timestep: Tensor, scale: float, generators: Sequence[torch.Generator],
        latent_scale: float,
    ) -> Tensor:  # fmt: skip
        """x0 (B, C, H, W) in place of uncond + scale (cond - uncond). `sigma`, `timestep` (B,): 999 is the most noise. One generator per picture."""
        sigma = sigma.view(-1, 1, 1, 1)
        length = (sigma**2 + 1) ** 0.5
        cond, uncond = ((x / length**2 - x0) * length / sigma for x0 in (cond_x0, uncond_x0))
        progress = 1.0 - timestep.view(-1, 1, 1, 1) / TIMESTEPS
        cond, uncond = self._with_noise(cond, uncond, progress, generators)
        cond, uncond = self._sharpened(cond, uncond, progress, sigma)
        added = _augmented(cond - uncond, self.dyn_cfg_augmentation, progress)
        added = self._tonemapped(added, uncond, scale, latent_scale)
        if self.spectral_mod_multiplier != 0:
            added = modulate_spectrum(added, self.spectral_mod_multiplier, self.spectral_mod_percentile, soft=self.spectral_mod_mode == "soft_clamp")
        if self.contrast_multiplier != 0:
            added = torch.lerp(added, added / added.std(dim=PICTURE, keepdim=True).clamp(min=TINY), 0.001 * self.contrast_multiplier * progress)
        guided = uncond + added * scale
        if self.rescale_cfg_phi != 0:
            guided = rescale_guidance(guided, cond, self.rescale_cfg_phi)
        if self.combat_cfg_drift != 0:
            guided = torch.lerp(guided, without_drift(guided, self.combat_method), self.combat_cfg_drift * progress.clamp(max=1))
        if self.divisive_norm_multiplier > 0:
            normed = normalize_locally(guided, 2 * int(self.divisive_norm_size) + 1)
            guided = torch.lerp(guided, normed, self.divisive_norm_multiplier * progress)
        return x / length**2 - guided * sigma / length

    def _with_noise(self, cond: Tensor, uncond: Tensor, progress: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        if self.extra_noise_multiplier <= 0:
            return cond, uncond
        noise = make_noise(self.extra_noise_type, cond, generators)
        if self.extra_noise_lowpass > 0:
            noise = without_strong_frequencies(noise, self.extra_noise_lowpass)
        method, strength = self.extra_noise_method, 0.001 * self.extra_noise_multiplier * progress
        if method.startswith("cads"):
            return tuple(
                add_as_cads(v, noise * v if "speckle" in method else noise, progress, self.extra_noise_multiplier / 100.0, "rescaled" in method)
                for v in (cond, uncond)
            )  # type: ignore[return-value]  # two
        shaped = {"add": (noise, noise), "speckle": (cond * noise, uncond * noise)}
        ours, theirs = shaped.get(method) or tuple(_towards(v, noise) for v in (cond, uncond))
        return cond + ours * strength, uncond - theirs * strength

    def _sharpened(self, cond: Tensor, uncond: Tensor, progress: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed with a filtered copy; a negative amount of a blur sharpens."""
        if self.sharpness_multiplier == 0:
            return cond, uncond
        share = 0.001 * self.sharpness_multiplier * progress
        changed = [torch.lerp(v, filter_latents(v, self.sharpness_method, sigma), share) for v in (cond, uncond)]
        return changed[0], changed[1] if self.affect_uncond == "Sharpness" else uncond

    def _tonemapped(self, added: Tensor, uncond: Tensor, scale: float, latent_scale: float) -> Tensor:
        """What guidance adds, with its extremes compressed. 0 is off."""
        multiplier, percentile = self.tonemap_multiplier, self.tonemap_percentile
        if multiplier == 0:
            return added
        share = percentile / 100.0
        if self.tonemap_method == "reinhard":
            size = added.norm(dim=1, keepdim=True) + TINY
            top = multiplier * (3.0 * size.std(dim=PICTURE, keepdim=True) / max(share, TINY) + size.mean(dim=PICTURE, keepdim=True))
            return added / size * _compress(size, top)
        if self.tonemap_method == "reinhard_perchannel":
            size = added.norm(dim=PLACES, keepdim=True) + TINY
            return added / size * _compress(size, multiplier * (3.0 / max(share, TINY) + size))
        if self.tonemap_method == "arctan":
            size = added.norm(dim=1, keepdim=True) + TINY
            unit = added / size
            return size * (torch.atan(unit * multiplier) / multiplier + unit * (1.0 - share))
        if self.tonemap_method == "quantile":
            limit = (_quantile((uncond + added * scale).flatten(1).abs(), share) * multiplier).clamp(min=1.0).view(-1, 1, 1, 1)
            return added.clamp(-limit, limit) / limit
        if self.tonemap_method == "gated":
            return _gated(added, uncond, scale, share, GATE_CEILING * multiplier, latent_scale)
        if self.tonemap_method == "cfg-mimic":
            mimicked = added * multiplier
            return _spread_as(added, mimicked, share) + mimicked.mean(dim=PLACES, keepdim=True)
        limit = multiplier / 2.0 / max(scale, TINY)
        return added * (limit / added.pow(2).mean(dim=PICTURE, keepdim=True).sqrt().clamp(min=limit))


def rescale_guidance(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), equations 15 and 16."""
    factor = cond.std(dim=PICTURE, keepdim=True) / guided.std(dim=PICTURE, keepdim=True).clamp(min=TINY)
    return torch.lerp(guided, guided * factor, phi)


def without_drift(v: Tensor, method: str) -> Tensor:
    """Against the shift of the mean that guidance causes (Birch-Labs 2023)."""
    mean = v.mean(dim=PLACES, keepdim=True)
    if method == "subtract_median":
        return v - v.flatten(1).median(dim=1).values.view(-1, 1, 1, 1)
    if method == "sharpen":
        return v - mean / v.std(dim=PLACES, keepdim=True).clamp(min=TINY)
    if method != "subtract_channels" or v.shape[1] != 4:
        return v - mean
    kept = mean - torch.copysign(mean.abs() ** 1.5, mean)
    colors = v[:, 1:3].mean(dim=PICTURE, keepdim=True) * 0.5
    return v - torch.cat([kept[:, :1], colors, colors, kept[:, 3:]], dim=1)


def normalize_locally(v: Tensor, side: int) -> Tensor:
    """Divided by the standard deviation of the `side` x `side` places around each. Heeger 1992."""
    mean, mean_of_squares = (functional.avg_pool2d(part, side, stride=1, padding=side // 2, count_include_pad=False) for part in (v, v * v))
    return v / (mean_of_squares - mean * mean).clamp(min=0).add(1e-6).sqrt()


def modulate_spectrum(v: Tensor, power: float, percentile: float, *, soft: bool) -> Tensor:
    """Weak frequencies up and strong ones down, by up to one half each, to the given power; how weak or strong is told by percentiles of the
    logarithm of their amplitude. Soft: the further out, the more."""
    spectrum = torch.fft.fft2(v.float())
    level = spectrum.abs().clamp(min=TINY).log()
    ranked = level.abs().flatten(2)
    low, high, top = (_quantile(ranked, share)[..., None] for share in (percentile / 100, 1 - percentile / 100, 1.0))
    if soft:
        up = torch.where(level < low, 1 + (1 - level / low.clamp(min=TINY)).clamp(max=0.5), 1.0)
        down = torch.where(level > high, 1 - ((level - high) / (top - high).clamp(min=TINY)).clamp(max=0.5), 1.0)
    else:
        up, down = torch.where(level < low, 1.5, 1.0), torch.where(level < high, 1.0, 0.5)
    factor = (up * down) ** power
    return torch.fft.ifft2(spectrum * (factor.clamp(0.05, 20) if soft else factor)).real.to(v.dtype)


def filter_latents(v: Tensor, method: str, sigma: Tensor) -> Tensor:
    """Blurred, or with "cas" sharpened more at low noise."""
    if method == "cas":
        return sharpen_by_contrast(v, sigma.clamp(max=1.0))
    if method == "gaussian":
        return _window_mean(v, None)
    std = v.std(dim=PICTURE, keepdim=True).clamp(min=TINY)
    return _window_mean(v, v if method == "anisotropic" else (v - v.mean(dim=PICTURE, keepdim=True)) / std)


def _window_mean(v: Tensor, guide: Tensor | None) -> Tensor:
    """Mean over a window, weighted by distance and, with a guide, by its likeness over channels (Tomasi and Manduchi 1998; L1 distance)."""
    reach = min(BLUR_SIDE // 2, v.shape[2] - 1, v.shape[3] - 1)
    total, weights = torch.zeros_like(v), torch.zeros_like(v[:, :1])
    padded, padded_guide = (None if one is None else functional.pad(one, (reach,) * 4, mode="reflect") for one in (v, guide))
    height, width = v.shape[2:]
    assert padded is not None
    for down in range(2 * reach + 1):
        for across in range(2 * reach + 1):
            away = (down - reach) ** 2 + (across - reach) ** 2
            weight = torch.full_like(v[:, :1], math.exp(-0.5 * away / BLUR_SIGMA**2))
            if guide is not None and padded_guide is not None:
                unlike = (padded_guide[..., down : down + height, across : across + width] - guide).abs().sum(dim=1, keepdim=True)
                weight = weight * torch.exp(-0.5 * (unlike / BLUR_SIGMA) ** 2)
            total += weight * padded[..., down : down + height, across : across + width]
            weights += weight
    return total / weights


def sharpen_by_contrast(v: Tensor, amount: Tensor) -> Tensor:
    """Lottes, "FidelityFX Contrast Adaptive Sharpening" (2019), applied to latents: the weight of the four neighbors by the local contrast."""
    padded = functional.pad(v, (1, 1, 1, 1))
    height, width = v.shape[2:]
    around = [[padded[..., down : down + height, across : across + width] for across in range(3)] for down in range(3)]
    cross = torch.stack([around[0][1], around[1][0], around[1][1], around[1][2], around[2][1]])
    corners = torch.stack([around[0][0], around[0][2], around[2][0], around[2][2]])
    least, most = cross.amin(dim=0) + corners.amin(dim=0), cross.amax(dim=0) + corners.amax(dim=0)
    contrast = torch.minimum(least, 2 - most) / torch.where(most.abs() < TINY, TINY, most)
    weight = -torch.copysign(contrast.abs().sqrt(), contrast) * torch.lerp(torch.full_like(amount, 1 / 8), torch.full_like(amount, 1 / 5), amount)
    divisor = 1 + 4 * weight
    shrink = torch.where(divisor.abs() < TINY, 10.0, 1 / torch.where(divisor.abs() < TINY, 1.0, divisor)).clamp(-10, 10)
    return ((cross[0] + cross[1] + cross[3] + cross[4]) * weight + v) * shrink


def _augmented(added: Tensor, method: str, progress: Tensor) -> Tensor:
    """Guidance by a half cosine of the progress: half at the most noise, all at the least. "mimic" takes the length from a compressed copy."""
    if method == "None":
        return added
    factor = 1 - torch.cos(0.5 * math.pi * progress) / 2
    if method == "dyncfg-halfcosine":
        return added * factor
    mimicked = _spread_as(added, added * factor, 0.995) + added.mean(dim=PLACES, keepdim=True)
    return added / (added.norm(dim=1, keepdim=True) + TINY) * mimicked.norm(dim=1, keepdim=True)


def _spread_as(added: Tensor, mimicked: Tensor, share: float) -> Tensor:
    """`added` with extremes cut, as far from zero in each channel as `mimicked` is from its mean."""
    wanted = (mimicked - mimicked.mean(dim=PLACES, keepdim=True)).abs().amax(dim=PLACES, keepdim=True)
    have = _quantile((added - added.mean(dim=PLACES, keepdim=True)).flatten(2).abs(), share)[..., None]
    limit = torch.maximum(have, wanted).clamp(min=TINY)
    return added.clamp(-limit, limit) / limit * wanted


def _gated(added: Tensor, uncond: Tensor, scale: float, share: float, ceiling: float, latent_scale: float) -> Tensor:
    """Thresholded in pictures whose guided latents, in VAE units, go beyond the ceiling."""
    guided = (uncond + added * scale) / latent_scale
    too_far = (guided - guided.mean(dim=PLACES, keepdim=True)).abs().amax(dim=PICTURE, keepdim=True) >= ceiling
    limit = _quantile((added / latent_scale).flatten(2).abs(), share)[..., None].clamp(min=GATE_FLOOR)
    return torch.where(too_far, (added / latent_scale).clamp(-limit, limit) / limit * latent_scale, added)


def _compress(size: Tensor, top: Tensor) -> Tensor:
    """Reinhard et al. 2002, equation 3: size / (1 + size / top)."""
    return size / (1 + size / top.clamp(min=TINY))


def _towards(v: Tensor, noise: Tensor) -> Tensor:
    """From the noise to v, scaled down by how near the noise is to v: the "train difference" of mergers, between v, noise and v."""
    return torch.sign(noise - v) * (v - noise).abs() * 0.5


def _quantile(values: Tensor, share: float) -> Tensor:
    """Over the last dim, kept; interpolated. Sorting has no limit of values, torch.quantile has."""
    ranked, place = values.sort(dim=-1).values, min(max(share, 0.0), 1.0) * (values.shape[-1] - 1)
    first = math.floor(place)
    last = min(first + 1, values.shape[-1] - 1)
    return torch.lerp(ranked[..., first : first + 1], ranked[..., last : last + 1], place - first)


def latent_scale_of(engine: Any) -> float:
    """The factor between the VAE's latents and the denoiser's; 1 if the VAE does not say."""
    return float(getattr(getattr(engine.forge_objects.vae.first_stage_model, "config", None), "scaling_factor", None) or 1.0)
