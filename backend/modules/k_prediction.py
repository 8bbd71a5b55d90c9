"""What a network's output means: noise levels, timesteps, and how to get the denoised picture from the model output.

Noise levels of diffusion models are sigmas in the variance-exploding form x = x0 + sigma * noise (Karras et al. 2022); the networks were trained in
the variance-preserving form (Ho et al. 2020), sigma = sqrt((1 - alpha_bar) / alpha_bar). Noise levels of flow models are times, x = (1 - t) x0 +
t * noise (Liu et al. 2022, "Flow Straight and Fast"); the network predicts the flow noise - x0. Must not know networks, devices or samplers.

Shapes: B batch, C channels, H W rows and columns, N timesteps the model was trained on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

PREDICTION_TYPES = ("epsilon", "v_prediction", "const", "edm")
NEARLY_PURE_NOISE_SIGMA = 999999999.9
"""What percent 0 maps to, so that a range starting at 0 % contains every sigma."""
TERMINAL_ALPHA_BAR = 4.8973451890853435e-08
"""Replaces 0 in a zero-SNR schedule, where sigma would be infinite. Other UIs use the same value, so pictures agree."""


class AbstractPrediction(nn.Module, ABC):
    """Scalings between noisy picture, model input, model output and denoised picture, and the table of noise levels.

    `sigmas` (N,) is the model's table, ascending. `is_flow`: noise levels are times of a rectified flow, 0..1.
    """

    sigmas: Tensor
    is_flow: bool = False

    def __init__(self, sigma_data: float = 1.0, prediction_type: str = "epsilon") -> None:
        super().__init__()
        if prediction_type == "eps":
            prediction_type = "epsilon"
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"Prediction type {prediction_type!r} is unknown. Use one of {', '.join(PREDICTION_TYPES)}.")
        self.sigma_data = sigma_data
        self.prediction_type = prediction_type

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's time input for a noise level, same shape, fp32."""

    @abstractmethod
    def position(self, sigma: Tensor) -> Tensor:
        """A noise level's position in the table, integer or fractional, same shape, fp32."""

    @abstractmethod
    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level at a position in the table, integer or fractional, same shape, fp32."""

    @abstractmethod
    def percent_to_sigma(self, percent: float) -> float:
        """The noise level after `percent` (0..1) of sampling. 0 returns a level above all others, 1 returns 0."""

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        """The picture at noise level `sigma`, scaled as the network was trained. `sigma` is (B,) or broadcasts."""
        if self.prediction_type == "const":
            return noise
        sigma = _like_picture(sigma, noise)
        return noise / (sigma**2 + self.sigma_data**2) ** 0.5

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """x0 from the network's output and the unscaled noisy picture.

        epsilon: Ho et al. 2020, eq. 15; v: Salimans and Ho 2022, appendix D; edm: Karras et al. 2022, table 1.
        """
        sigma = _like_picture(sigma, model_output)
        if self.prediction_type in ("epsilon", "const"):
            return model_input - model_output * sigma
        data_variance, variance = self.sigma_data**2, sigma**2 + self.sigma_data**2
        scale = sigma * self.sigma_data / variance**0.5
        kept = model_input * (data_variance / variance)
        return kept - model_output * scale if self.prediction_type == "v_prediction" else kept + model_output * scale

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """The start of sampling: a latent picture with noise of level `sigma`. `max_denoise` scales the noise by sqrt(1 + sigma^2), the exact
        variance-preserving start, instead of by sigma."""
        sigma = _like_picture(sigma, noise)
        if self.prediction_type == "const":
            return sigma * noise + (1.0 - sigma) * latent_image
        scale = (1.0 + sigma**2) ** 0.5 if max_denoise else sigma
        return noise * scale + latent_image

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        """Undo the scaling of the latent picture in `noise_scaling`."""
        return latent / (1.0 - _like_picture(sigma, latent)) if self.prediction_type == "const" else latent


class Prediction(AbstractPrediction):
    """A model trained on N discrete timesteps. Timesteps between them are interpolated in log sigma.

    Buffers: `alphas_cumprod`, `sigmas` (ascending) and `log_sigmas`, (N,) fp32.
    """

    alphas_cumprod: Tensor
    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(
        self,
        sigma_data: float = 1.0,
        prediction_type: str = "epsilon",
        beta_schedule: str = "scaled_linear",
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        timesteps: int = 1000,
        *,
        alphas_cumprod: Tensor | None = None,
        zero_terminal_snr: bool = False,
        quantize_timesteps: bool = False,
    ) -> None:
        """`alphas_cumprod` (N,) replaces the named schedule. `quantize_timesteps` rounds to integer timesteps."""
        super().__init__(sigma_data, prediction_type)
        self.quantize_timesteps = quantize_timesteps
        alphas_bar = _alphas_bar(beta_schedule, linear_start, linear_end, timesteps) if alphas_cumprod is None else alphas_cumprod.double()
        sigmas = ((1 - alphas_bar) / alphas_bar) ** 0.5
        self.set_sigmas(rescale_zero_terminal_snr_sigmas(sigmas) if zero_terminal_snr else sigmas)

    def set_sigmas(self, sigmas: Tensor) -> None:
        """Replace the table of noise levels, (N,) ascending."""
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())
        self.register_buffer("alphas_cumprod", (1.0 / (sigmas**2 + 1.0)).float())

    def position(self, sigma: Tensor) -> Tensor:
        return self.timestep(sigma)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of a noise level, same shape, fp32: linear in log sigma between table entries, clamped to the table.

        Source: Karras et al. 2022, appendix C.3.1, with log-linear interpolation instead of rounding.
        """
        table, log_sigma = self.log_sigmas.to(sigma.device), sigma.float().log()
        high = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, table.shape[0] - 1)
        low_value, high_value = table[high - 1], table[high]
        weight = ((log_sigma - low_value) / (high_value - low_value)).clamp(0, 1)
        if self.quantize_timesteps:
            weight = (weight > 0.5).float()
        return (high - 1) + weight

    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level of a timestep, integer or fractional, same shape, fp32."""
        table, position = self.log_sigmas.to(timestep.device), timestep.float().clamp(0, len(self.log_sigmas) - 1)
        low = position.floor().long()
        weight = position - low
        high = position.ceil().long()
        return ((1 - weight) * table[low] + weight * table[high]).exp()

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level after `percent` (0..1) of the timesteps. 0 returns a level above all others, 1 returns 0."""
        if percent <= 0.0:
            return NEARLY_PURE_NOISE_SIGMA
        if percent >= 1.0:
            return 0.0
        return float(self.sigma(torch.tensor((1.0 - percent) * (len(self.sigmas) - 1))))


class FlowPrediction(AbstractPrediction):
    """Rectified flow: noise levels are times t, x = (1 - t) x0 + t * noise, and the network predicts noise - x0.

    `shift` a moves times to suit the picture's size, t' = a t / (1 + (a - 1) t) (Esser et al. 2024, "Scaling Rectified Flow Transformers", section
    5.3.2); `shift_from_mu` computes it for a schedule written with e^mu. The network's time input is t * `multiplier`, or (1 - t) * `multiplier`
    with `time_is_clean`.
    Buffers: `sigmas` (N,) fp32, the shifted times 1/N .. 1.
    """

    is_flow = True

    def __init__(self, *, shift: float = 1.0, multiplier: float = 1000.0, timesteps: int = 1000, time_is_clean: bool = False) -> None:
        super().__init__(prediction_type="const")
        self.multiplier, self.time_is_clean, self.num_timesteps = multiplier, time_is_clean, timesteps
        self.set_shift(shift)

    def set_shift(self, shift: float) -> None:
        """Set the shift and its table. Raises: ValueError for a shift that is not above 0."""
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"A shift of {shift} was requested; it must be a finite number above 0 (1 means no shift).")
        self.shift = shift
        times = torch.arange(1, self.num_timesteps + 1, dtype=torch.float64) / self.num_timesteps
        self.register_buffer("sigmas", shift_time(times, shift).float())

    def timestep(self, sigma: Tensor) -> Tensor:
        time = sigma.float()
        return (1.0 - time if self.time_is_clean else time) * self.multiplier

    def position(self, sigma: Tensor) -> Tensor:
        """The unshifted time, in steps of 1 / N from the first entry."""
        return unshift_time(sigma.float(), self.shift) * self.num_timesteps - 1

    def sigma(self, timestep: Tensor) -> Tensor:
        return shift_time(((timestep.float() + 1) / self.num_timesteps).clamp(0.0, 1.0), self.shift)

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return NEARLY_PURE_NOISE_SIGMA
        return 0.0 if percent >= 1.0 else float(shift_time(torch.tensor(1.0 - percent, dtype=torch.float64), self.shift))


def shift_time(time: Tensor, shift: float) -> Tensor:
    """t' = a t / (1 + (a - 1) t). Esser et al. 2024, eq. 23."""
    return shift * time / (1 + (shift - 1) * time)


def unshift_time(time: Tensor, shift: float) -> Tensor:
    """The inverse of `shift_time`."""
    return time / (shift - (shift - 1) * time)


def shift_from_mu(mu: float) -> float:
    """e^mu: s = e^mu / (e^mu + 1/t - 1) equals a shift by this number."""
    return math.exp(mu)


def mu_of_tokens(tokens: int, *, few: tuple[int, float] = (256, 0.5), many: tuple[int, float] = (4096, 1.15)) -> float:
    """mu on the line through two (tokens, mu) points, as Flux derives it from the picture's size (4096 tokens for 1024x1024): more tokens, more
    noise."""
    slope = (many[1] - few[1]) / (many[0] - few[0])
    return few[1] + slope * (tokens - few[0])


def rescale_zero_terminal_snr_sigmas(sigmas: Tensor) -> Tensor:
    """Stretch a schedule so that the last timestep is (nearly) pure noise.

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    roots = (1.0 / (sigmas.double() ** 2 + 1.0)) ** 0.5
    first, last = roots[0].clone(), roots[-1].clone()
    alphas_bar = ((roots - last) * first / (first - last)) ** 2
    alphas_bar[-1] = TERMINAL_ALPHA_BAR
    return ((1 - alphas_bar) / alphas_bar) ** 0.5


def k_prediction_from_diffusers_scheduler(scheduler: Any) -> Prediction:
    """A Prediction with a diffusers scheduler's noise schedule. Raises: NotImplementedError for kinds other than epsilon and v."""
    config = scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise NotImplementedError(f"A scheduler has prediction type {kind!r}; only epsilon and v_prediction are supported.")
    if config.get("beta_schedule") != "scaled_linear":
        raise NotImplementedError(f"A scheduler has beta schedule {config.get('beta_schedule')!r}; only scaled_linear is supported.")
    return Prediction(
        prediction_type=kind,
        linear_start=config["beta_start"],
        linear_end=config["beta_end"],
        timesteps=config["num_train_timesteps"],
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )


def _alphas_bar(schedule: str, start: float, end: float, num_timesteps: int) -> Tensor:
    """Cumulative products of 1 - beta, (N,) fp64. "scaled_linear": square roots of betas are linear, as Stable Diffusion was trained."""
    if schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(start, end, num_timesteps, dtype=torch.float64)
    else:
        raise ValueError(f"Beta schedule {schedule!r} is unknown. Use scaled_linear or linear.")
    return torch.cumprod(1.0 - betas, dim=0)


def _like_picture(sigma: Tensor, picture: Tensor) -> Tensor:
    """Sigma with trailing dims of size 1, to broadcast over a picture."""
    return sigma.view(sigma.shape[:1] + (1,) * (picture.ndim - 1)) if sigma.ndim == 1 else sigma
