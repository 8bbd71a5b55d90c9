"""`python -m tools.sampler_report`: compares every sampler and schedule with its reference; writes the measured part of docs/samplers.md.

The toy problems: data near -1 or +1 (smooth, nonlinear), where two implementations must agree step by step; and normal data, where the path from
noise to data has a closed form. `--k-diffusion FOLDER` adds k-diffusion's published sampling.py from an unpacked download.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.modules.k_prediction import Prediction
from backend.sampling.registry import SAMPLERS, SamplerSpec
from backend.sampling.sampler_types import BrownianNoise, SamplerSettings
from backend.sampling.schedules import SCHEDULES, ScheduleSettings, compute_sigmas
from tools.documents import write_measured
from tools.sampler_references import LIBRARY_REFERENCES, Reference, load_k_diffusion

REPORT_FILE = Path(__file__).resolve().parents[1] / "docs" / "samplers.md"
STEP_COUNTS = (6, 20, 36)
SCHEDULE_STEP_COUNTS = (2, 7, 11, 20, 32, 50)
MEAN, SPREAD = 0.7, 0.5
HIGH, LOW = 8.0, 0.2


# Toy problems


class TwoPeaks:
    """E[x0 | x] for data near -1 or +1 (spread 0.3). The unconditional x0 for CFG++ is that of normal data."""

    last_uncond_BCHW: Tensor | None = None

    def __call__(self, x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        sigma = sigma_B.view(-1, 1, 1, 1)
        variance = 0.09 + sigma**2
        self.last_uncond_BCHW = denoise_normal(x_BCHW, sigma_B)
        return (0.09 * x_BCHW + sigma**2 * torch.tanh(x_BCHW / variance)) / variance


def denoise_normal(x_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """E[x0 | x] for normal data; linear in x."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return (SPREAD**2 * x_BCHW + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def flow_of_normal(x_BCHW: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The exact end of the probability flow: distances from the mean shrink with the marginal's spread."""
    return MEAN + (x_BCHW - MEAN) * math.sqrt((SPREAD**2 + sigma_next**2) / (SPREAD**2 + sigma**2))


class SeededNoise:
    """One generator for everything; draws in fp32, like some draws of the library."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def next(self, x_BCHW: Tensor) -> Tensor:
        return torch.randn(x_BCHW.shape, generator=self._generator, dtype=torch.float32).to(x_BCHW)

    def brownian(self, x_BCHW: Tensor, sigma_min: float, sigma_max: float) -> BrownianNoise:
        """Random numbers that depend only on the interval they are requested for, to six decimals."""

        def between(sigma: float, sigma_next: float) -> Tensor:
            seed = round(1e6 * sigma) * 7919 + round(1e6 * sigma_next)
            return torch.randn(x_BCHW.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(x_BCHW)

        return between


# Schedules


@dataclass(frozen=True, slots=True)
class ScheduleReference:
    """`compute(num_steps)` returns the levels, ending in 0; `tolerance` is relative."""

    source: str
    compute: Callable[[int], np.ndarray]
    tolerance: float = 1e-5


def _table() -> np.ndarray:
    """Stable Diffusion's noise levels according to the library."""
    from diffusers import DDIMScheduler  # heavy, and only this report needs it

    alphas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double().numpy()
    return np.sqrt((1 - alphas) / alphas)


def _library_schedule(**config: Any) -> ScheduleReference:
    def compute(num_steps: int) -> np.ndarray:
        from diffusers import EulerDiscreteScheduler

        scheduler = EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000, interpolation_type="linear", **config
        )
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.double().numpy()

    named = ", ".join(f"{key}={value}" for key, value in config.items())
    return ScheduleReference(f"EulerDiscreteScheduler({named})", compute, 1e-3 if config.get("timestep_spacing") == "linspace" else 1e-4)


def _formula(source: str, compute: Callable[[int], Any], tolerance: float = 1e-5) -> ScheduleReference:
    return ScheduleReference(source, lambda num_steps: np.append(np.asarray(compute(num_steps), dtype=np.float64), 0.0), tolerance)


def _at_timesteps(timesteps: np.ndarray) -> np.ndarray:
    table = np.log(_table())
    return np.exp(np.interp(timesteps, np.arange(len(table)), table))


def _loglinear(levels: Sequence[float], num_steps: int) -> np.ndarray:
    return np.exp(np.interp(np.linspace(0, len(levels) - 1, num_steps), np.arange(len(levels)), np.log(levels)))


def _ays_levels() -> list[float]:
    from diffusers.schedulers.scheduling_utils import AysSchedules

    return [*AysSchedules["StableDiffusionSigmas"][:-1], 0.029]


def schedule_references() -> dict[str, ScheduleReference | None]:
    """By schedule; None if there is nothing independent to compare with."""
    even = _library_schedule(timestep_spacing="linspace")
    exponential = _library_schedule(use_exponential_sigmas=True)
    ays = _formula("the library's AysSchedules, log-linear by numpy", lambda n: _loglinear(_ays_levels(), n))
    ends = lambda: (_table()[-1], _table()[0])  # noqa: E731  # evaluated late: the library is heavy
    return {
        "automatic": even,
        "uniform": even,
        "karras": _library_schedule(use_karras_sigmas=True),
        "exponential": exponential,
        "polyexponential": replace(exponential, source=f"{exponential.source}, which it is at rho 1"),
        "sgm_uniform": _formula("timesteps 999 to 0 in n + 1 even parts, numpy", lambda n: _at_timesteps(np.linspace(999, 0, n + 1)[:-1])),
        "kl_optimal": _formula(
            "Sabour et al. 2024, atan(sigma) even, numpy", lambda n: np.tan(np.linspace(np.arctan(ends()[0]), np.arctan(ends()[1]), n + 1)[:-1]), 1e-4
        ),
        "align_your_steps": ays,
        "simple": _formula("every 1000/n-th entry of the library's table", lambda n: _table()[::-1][[int(k * 1000 / n) for k in range(n)]]),
        "normal": even,
        "ddim": _library_schedule(timestep_spacing="leading", steps_offset=1),
        "beta": _library_schedule(use_beta_sigmas=True),
        "turbo": _library_schedule(timestep_spacing="trailing"),
        "align_your_steps_GITS": None,
        "align_your_steps_11": ays,
        "align_your_steps_32": None,
    }


def measure_schedule(name: str, reference: ScheduleReference) -> float:
    """Largest relative difference of a level, over several numbers of steps."""
    worst = 0.0
    for num_steps in SCHEDULE_STEP_COUNTS:
        ours = compute_sigmas(name, num_steps, Prediction(), ScheduleSettings()).double().numpy()
        theirs = reference.compute(num_steps)
        assert ours[-1] == theirs[-1] == 0
        worst = max(worst, float(np.abs(ours[:-1] / theirs[:-1] - 1).max()))
    return worst


# Samplers


def measure_difference(spec: SamplerSpec, reference: Reference, schedule: str, *, step_counts: Sequence[int] = STEP_COUNTS) -> float:
    """Largest difference of the final result over several numbers of steps, two-peak data, in units of the data (-1 to 1)."""
    worst = 0.0
    for num_steps in step_counts:
        sigmas = compute_sigmas(schedule, num_steps, Prediction()).double()
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * sigmas[0]
        ours = spec.function(TwoPeaks(), x, sigmas, settings=reference.settings, noise=SeededNoise())
        theirs = reference(TwoPeaks(), x, sigmas, settings=reference.settings, noise=SeededNoise())
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst


def measure_order(spec: SamplerSpec) -> float:
    """How the error decreases with the number of steps, without noise, on uneven levels of normal data, against the exact flow."""
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * HIGH
    errors = []
    for num_steps in (60, 120, 240):
        levels = torch.linspace(HIGH ** (1 / 3), LOW ** (1 / 3), num_steps + 1, dtype=torch.float64) ** 3
        if spec.name == "DPM fast":  # uses only the end points, and ends at the last level above 0
            levels = torch.cat([levels[:-2], levels[-1:], torch.zeros(1, dtype=torch.float64)])
        settings = SamplerSettings(eta=0.0, uni_pc_lower_order_final=False)
        result = spec.function(denoise_normal, x, levels, settings=settings, noise=SeededNoise())
        errors.append(float((result - flow_of_normal(x, HIGH, LOW)).abs().max()))
    return math.log2(errors[0] / errors[2]) / 2


def measure_distribution(spec: SamplerSpec) -> tuple[float, float]:
    """Mean and spread of 9,216 samples after 120 steps with the sampler's own noise; the data has 0.7 and 0.5."""
    levels = torch.cat([torch.linspace(math.log(HIGH), math.log(0.01), 120, dtype=torch.float64).exp(), torch.zeros(1, dtype=torch.float64)])
    x = MEAN + torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * math.sqrt(HIGH**2 + SPREAD**2)
    result = spec.function(denoise_normal, x, levels, settings=SamplerSettings(), noise=SeededNoise())
    return float(result.mean()), float(result.std())


NO_ORDER = {
    "DPM adaptive": "chooses its own steps",
    "Restart": "restarts add noise",
    "LCM": "always adds noise",
    "DDPM": "always adds noise",
}
EVEN_STEPS_ONLY = {"IPNDM", "PLMS"}
STOCHASTIC = [spec.name for spec in SAMPLERS if spec.eta_default > 0] + ["Restart", "LCM", "DDPM"]


# Pictures of a real network


def measure_pictures(checkpoint: Path | None = None) -> dict[str, int]:
    """By sampler: largest difference in 8-bit levels between the product's picture and the one made with the reference's steps."""
    from modules.samplers import registry
    from modules.samplers.kdiffusion import KDiffusionSampler
    from tools.demo_model.product import DEMO_CHECKPOINT, installed_product, make_text_picture
    from tools.sampler_grid import PROMPT, SEED

    differences = {}
    with installed_product(checkpoint or DEMO_CHECKPOINT):
        for spec in SAMPLERS:
            reference = LIBRARY_REFERENCES.get(spec.name)
            if reference is None:
                continue
            theirs = replace(spec, function=reference)
            before = registry.all_samplers_map[spec.name]
            fields: dict[str, Any] = {"sampler_name": spec.name, "scheduler": "Automatic", "eta": reference.settings.eta}
            own = np.asarray(make_text_picture(PROMPT, seed=SEED, **fields)).astype(int)
            registry.add_sampler(before._replace(constructor=partial(KDiffusionSampler, theirs)))
            try:
                other = np.asarray(make_text_picture(PROMPT, seed=SEED, **fields)).astype(int)
            finally:
                registry.add_sampler(before)
            differences[spec.name] = int(np.abs(own - other).max())
    return differences


def measure_batches(checkpoint: Path | None = None) -> dict[str, int]:
    """By sampler: largest difference in 8-bit levels between pictures of a batch of four and the same pictures made alone."""
    from modules.processing import StableDiffusionProcessingTxt2Img, process_images
    from tools.demo_model.product import DEMO_CHECKPOINT, installed_product, make_text_picture, usual_fields
    from tools.sampler_grid import PROMPT, SEED

    differences = {}
    with installed_product(checkpoint or DEMO_CHECKPOINT) as app:
        app.options.return_grid = False
        for spec in SAMPLERS:
            fields = {"sampler_name": spec.name, "scheduler": "Automatic"}
            batch = process_images(StableDiffusionProcessingTxt2Img(**usual_fields(PROMPT, SEED, {**fields, "batch_size": 4}))).images
            alone = [make_text_picture(PROMPT, seed=SEED + place, **fields) for place in range(4)]
            differences[spec.name] = max(int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max()) for one, other in zip(batch, alone))
    return differences


# The report


def schedule_table() -> list[str]:
    lines = ["| schedule | reference | largest relative difference of a level |", "|---|---|---|"]
    references = schedule_references()
    for spec in SCHEDULES:
        reference = references[spec.name]
        if reference is None:
            lines.append(f"| {spec.label} | none at hand: a published table (see above) | - |")
        else:
            lines.append(f"| {spec.label} | {reference.source} | {measure_schedule(spec.name, reference):.0e} |")
    return lines


def difference_table(references: dict[str, Reference]) -> list[str]:
    """Samplers by schedules: largest difference from the reference."""
    short = [spec.label.replace("Align Your Steps", "AYS") for spec in SCHEDULES]
    lines = [f"| sampler | reference | {' | '.join(short)} |", "|---|---|" + "---|" * len(short)]
    for spec in SAMPLERS:
        reference = references.get(spec.name)
        if reference is None:
            lines.append(f"| {spec.name} | none | " + " | ".join("-" for _ in short) + " |")
            continue
        values = [f"{measure_difference(spec, reference, schedule.name):.0e}" for schedule in SCHEDULES]
        source = reference.source + (f" ({reference.limits})" if reference.limits else "")
        lines.append(f"| {spec.name} | {source} | {' | '.join(values)} |")
    return lines


def closed_form_table(pictures: dict[str, int], batches: dict[str, int]) -> list[str]:
    titles = ("sampler", "order of convergence, no noise", "mean and spread with its noise", "pictures, 8-bit levels", "batch of 4, 8-bit levels")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for spec in SAMPLERS:
        if spec.name in NO_ORDER:
            order = NO_ORDER[spec.name]
        elif spec.name in EVEN_STEPS_ONLY:
            order = f"{measure_order(spec):.1f} (its weights are for even steps)"
        else:
            order = f"{measure_order(spec):.1f}"
        mean, spread = measure_distribution(spec) if spec.name in STOCHASTIC else (math.nan, math.nan)
        distribution = f"{mean:.3f}, {spread:.3f}" if spec.name in STOCHASTIC else "no noise"
        lines.append(f"| {spec.name} | {order} | {distribution} | {pictures.get(spec.name, '-')} | {batches.get(spec.name, '-')} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.sampler_report", description=__doc__)
    parser.add_argument("--k-diffusion", type=Path, help="an unpacked download of k-diffusion")
    parser.add_argument("--out", type=Path, default=REPORT_FILE)
    args = parser.parse_args()
    import diffusers

    lines = [f"Versions: torch {torch.__version__}, diffusers {diffusers.__version__}, numpy {np.__version__}."]
    lines += ["", "### Schedules", "", *schedule_table()]
    lines += ["", "### Samplers against the library", "", *difference_table(dict(LIBRARY_REFERENCES))]
    if args.k_diffusion:
        lines += ["", f"### Samplers against {args.k_diffusion.name}", "", *difference_table(load_k_diffusion(args.k_diffusion))]
    lines += ["", "### Samplers against closed forms, and on the demo checkpoint", "", *closed_form_table(measure_pictures(), measure_batches())]
    write_measured(args.out, lines, command="tools.sampler_report")


if __name__ == "__main__":
    main()
