"""Properties of every sampler: order of convergence against a closed form, correct distribution, one picture per seed, correct reports."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from backend.modules.k_prediction import Prediction
from backend.sampling import samplers, samplers_dpm
from backend.sampling.noise import ImageNoise
from backend.sampling.registry import SAMPLERS, SamplerSpec, find_sampler
from backend.sampling.sampler_types import SamplerSettings, StepInfo
from backend.sampling.samplers_dpm import fast_orders
from backend.sampling.samplers_multistep import integrate_lagrange, variance_preserving_time
from backend.sampling.samplers_one_step import restart_steps
from backend.sampling.schedules import SCHEDULES, compute_sigmas, karras_sigmas
from tests.backend.sampling.toys import MEAN, SPREAD, OneStream, denoise_gaussian, denoise_two_peaks, flow_gaussian, one_stream

NAMES = [spec.name for spec in SAMPLERS]
STOCHASTIC = {spec.name for spec in SAMPLERS if spec.eta_default > 0} | {"DDPM", "LCM"}
HIGH, LOW = 8.0, 0.2

# Least measured order of convergence. Methods that start with one Euler step have at most order 2.
ORDERS = {
    "Euler": 1, "Euler a": 1, "DDIM": 1, "DDIM CFG++": 1, "HeunPP2": 1, "Heun": 2, "DPM2": 2, "DPM2 a": 2, "DPM++ 2M": 2,
    "DPM++ 2S a": 2, "DPM++ SDE": 2, "DPM++ 2M SDE": 2, "DPM++ 2M SDE Heun": 2, "DPM++ 3M SDE": 2, "LMS": 2, "IPNDM_V": 2, "DEIS": 2, "UniPC": 3,
    "DPM fast": 2,
}  # fmt: skip


def _start(seed: int = 1, shape: tuple[int, ...] = (1, 4, 4, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * HIGH


def _run(spec: SamplerSpec, x: Tensor, sigmas: Tensor, *, denoise: Any = denoise_gaussian, on_step: Any = None, **settings: Any) -> Tensor:
    """Without noise unless `eta` is given; eta=None uses the sampler's default."""
    chosen = SamplerSettings(**{"eta": 0.0, "uni_pc_lower_order_final": False, **settings})
    return spec.function(denoise, x, sigmas, settings=chosen, noise=one_stream(), on_step=on_step)


def _largest_error(name: str, sigmas: Tensor) -> float:
    x = _start()
    return float((_run(find_sampler(name), x, sigmas) - flow_gaussian(x, HIGH, LOW)).abs().max())


def _measure_order(errors: list[float]) -> float:
    """Mean order over two doublings of the number of steps."""
    return math.log2(errors[0] / errors[2]) / 2


def _uneven(num_steps: int, rho: float) -> Tensor:
    return torch.linspace(HIGH ** (1 / rho), LOW ** (1 / rho), num_steps + 1, dtype=torch.float64) ** rho


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_order_of_convergence(name: str, order: int) -> None:
    """Doubling the steps divides the error by 2^order. Uneven steps; stochastic samplers without noise."""
    grids = [_uneven(num_steps, rho=3.0) for num_steps in (60, 120, 240)]
    if name == "DPM fast":  # takes only the ends, and the last level above 0 as its end
        grids = [torch.cat([grid[:-2], grid[-1:], torch.zeros(1, dtype=torch.float64)]) for grid in grids]
    errors = [_largest_error(name, grid) for grid in grids]
    assert _measure_order(errors) > order - 0.2, errors


@pytest.mark.parametrize(("name", "order"), [("IPNDM", 2), ("PLMS", 3), ("LMS", 2)])
def test_order_of_multistep_methods_on_even_steps(name: str, order: int) -> None:
    errors = [_largest_error(name, _uneven(num_steps, rho=1.0)) for num_steps in (120, 240, 480)]
    assert _measure_order(errors) > order - 0.2, errors


@pytest.mark.parametrize(("name", "order"), [("DEIS", 3), ("LMS", 4), ("IPNDM_V", 4)])
def test_order_once_the_history_is_full(name: str, order: int) -> None:
    """The first interval is halved repeatedly, so that the low order of the first steps does not matter."""

    def errors_at(num_steps: int) -> float:
        grid = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        first = grid[1] * 0.5 ** torch.arange(12, 0, -1, dtype=torch.float64)
        return _largest_error(name, HIGH * (LOW / HIGH) ** torch.cat([grid[:1], first, grid[1:]]))

    errors = [errors_at(num_steps) for num_steps in (40, 80, 160)]
    assert _measure_order(errors) > order - 0.25, errors


def test_dpm_adaptive_keeps_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sigmas = _start(), torch.tensor([HIGH, LOW, 0.0], dtype=torch.float64)
    seen: list[StepInfo] = []
    errors = []
    for tighter in (1, 100, 1000):
        monkeypatch.setattr(samplers_dpm, "ADAPTIVE_RTOL", 0.05 / tighter)
        monkeypatch.setattr(samplers_dpm, "ADAPTIVE_ATOL", 0.0078 / tighter)
        result = _run(find_sampler("DPM adaptive"), x, sigmas, on_step=seen.append if tighter == 1 else None)
        errors.append(float((result - flow_gaussian(x, HIGH, LOW)).square().mean().sqrt()))
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 4
    assert errors[2] < errors[1] / 4
    assert 4 < len(seen) < 40


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", [spec.name for spec in SCHEDULES])
def test_every_sampler_on_every_schedule_lands_on_the_data(name: str, schedule: str) -> None:
    """25 steps over the model's range with the sampler's noise: the pictures have the data's mean and nearly its standard deviation."""
    predictor = Prediction()
    sigmas = compute_sigmas(schedule, 25, predictor)
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(2)) * sigmas[0]
    result = _run(find_sampler(name), x, sigmas, eta=None)
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.06)
    assert float(result.std()) == pytest.approx(SPREAD, abs=_spread_tolerance(name, schedule))


def _spread_tolerance(name: str, schedule: str) -> float:
    """Errors at 25 steps that the formulas cause: Beta's last step falls from a noise level of about 1; steps even in time end with two long
    ones in log sigma, over which these two extrapolate (so their Automatic is exponential); LCM reduces the deviation by design."""
    if schedule == "beta" or (name in ("DPM++ 2M SDE Heun", "DPM++ 3M SDE") and schedule in ("automatic", "uniform", "normal", "ddim")):
        return 1.2
    return 0.6 if name == "LCM" else 0.2


@pytest.mark.parametrize("name", sorted(STOCHASTIC - {"LCM"}))
def test_stochastic_samplers_give_the_datas_distribution(name: str) -> None:
    sigmas = torch.cat([torch.linspace(math.log(HIGH), math.log(0.01), 120, dtype=torch.float64).exp(), torch.zeros(1, dtype=torch.float64)])
    x = MEAN + torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * math.sqrt(HIGH**2 + SPREAD**2)
    result = _run(find_sampler(name), x, sigmas, eta=None)
    assert float(result.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(result.std()) == pytest.approx(SPREAD, rel=0.06)
    start, end = (x - x.mean()).flatten(), (result - result.mean()).flatten()
    forgotten = float((start * end).mean() / start.std() / end.std())
    assert forgotten < 0.7, "fresh noise has taken the place of the start"


def test_restart_adds_noise_from_twenty_steps_on() -> None:
    x, spec = _start(), find_sampler("Restart")
    few, many = (karras_sigmas(n, 0.03, HIGH) for n in (19, 20))
    assert torch.equal(_run(spec, x, few), _run(find_sampler("Heun"), x, few))
    again = spec.function(denoise_gaussian, x, many, settings=SamplerSettings(), noise=one_stream(1))
    assert not torch.equal(_run(spec, x, many), again)


@pytest.mark.parametrize("schedule", [spec.name for spec in SCHEDULES])
def test_restart_draws_noise_once_for_each_way_back_up(schedule: str) -> None:
    """The first level may differ from the schedule's by rounding, which is not a step up."""
    noise, draws = one_stream(), []
    sigmas = compute_sigmas(schedule, 20, Prediction()).double()
    counting = OneStream(noise.generator)
    counting.next = lambda x: draws.append(1) or noise.next(x)  # type: ignore[method-assign, func-returns-value]
    find_sampler("Restart").function(denoise_gaussian, _start(), sigmas, settings=SamplerSettings(), noise=counting)
    pairs = restart_steps(sigmas.tolist())
    assert len(draws) == sum(later[0] > earlier[1] for earlier, later in pairwise(pairs)) <= 1


@pytest.mark.parametrize(("num_steps", "num_restarts", "restart_steps_each"), [(20, 1, 9), (35, 1, 9), (36, 2, 9), (60, 2, 15)])
def test_restart_spends_its_steps_where_it_says(num_steps: int, num_restarts: int, restart_steps_each: int) -> None:
    pairs = restart_steps(karras_sigmas(num_steps, 0.03, 14.6).tolist())
    assert len(pairs) == num_steps
    rises = [index for index in range(1, len(pairs)) if pairs[index][0] > pairs[index - 1][1]]
    assert len(rises) == num_restarts
    assert all(pairs[index][0] == pytest.approx(2.0, rel=0.4) and pairs[index - 1][1] == pytest.approx(0.1, rel=0.4) for index in rises)
    assert [b - a for a, b in pairwise(rises)] == [restart_steps_each] * (num_restarts - 1)
    assert pairs[-1][1] == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "DPM adaptive"])
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    """Without DPM adaptive, whose steps depend on the error over the whole batch."""
    spec, seeds = find_sampler(name), [5, 6, 7]
    sigmas = karras_sigmas(22, 0.03, 14.6).float()

    def sample(some: list[int]) -> Tensor:
        noise = ImageNoise((4, 6, 6), some, source="CPU")
        return spec.function(denoise_two_peaks, noise.first() * sigmas[0], sigmas, settings=SamplerSettings(), noise=noise)

    batch = sample(seeds)
    assert torch.equal(batch[1:2], sample([6]))
    assert torch.equal(batch.flip(0), sample(seeds[::-1]))


@pytest.mark.parametrize("name", NAMES)
def test_reports_count_up_and_show_what_went_in(name: str) -> None:
    seen: list[StepInfo] = []
    sigmas = karras_sigmas(8, 0.03, HIGH)
    x = _start()
    _run(find_sampler(name), x, sigmas, on_step=seen.append)
    assert [info.index for info in seen] == list(range(len(seen)))
    assert seen[0].sigma == pytest.approx(HIGH)
    assert torch.equal(seen[0].x, x)
    torch.testing.assert_close(seen[0].denoised, denoise_gaussian(x, torch.tensor([HIGH], dtype=torch.float64)))
    if name not in ("DPM fast", "DPM adaptive"):
        assert len(seen) == 8


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_from_the_report_ends_the_sampling(name: str) -> None:
    class Stop(Exception):
        pass

    def stop(info: StepInfo) -> None:
        if info.index == 1:
            raise Stop

    with pytest.raises(Stop):
        _run(find_sampler(name), _start(), karras_sigmas(8, 0.03, HIGH), on_step=stop)


@pytest.mark.parametrize("spec", SAMPLERS, ids=NAMES)
def test_calls_of_the_network(spec: SamplerSpec) -> None:
    """One per step, two for second-order samplers (except in the last step); DPM fast makes exactly as many as steps."""
    calls = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise_gaussian(x, sigma)

    _run(spec, _start(), karras_sigmas(10, 0.03, HIGH), denoise=counting)
    expected = {"PLMS": 11, "HeunPP2": 8 * 3 + 2 + 1}.get(spec.name, 19 if spec.is_second_order else 10)
    assert calls % 3 == 0 if spec.name == "DPM adaptive" else calls == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_very_few_steps(name: str, num_steps: int) -> None:
    sigmas = karras_sigmas(num_steps, 0.03, HIGH)
    x = _start()
    result = _run(find_sampler(name), x, sigmas, eta=None)
    assert result.isfinite().all()
    if num_steps == 1:
        assert torch.allclose(result, denoise_gaussian(x, torch.tensor([HIGH], dtype=torch.float64)))


def test_cfg_plus_plus_renoises_with_the_unconditional() -> None:
    class Guided:
        last_uncond_BCHW: Tensor | None = None

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            self.last_uncond_BCHW = denoise_gaussian(x, sigma)
            return denoise_two_peaks(x, sigma)

    x, sigmas = _start(), torch.tensor([3.0, 1.0], dtype=torch.float64)
    sigma = torch.tensor([3.0], dtype=torch.float64)
    result = samplers.sample_ddim_cfgpp(Guided(), x, sigmas, settings=SamplerSettings(), noise=one_stream())
    expected = denoise_two_peaks(x, sigma) + (x - denoise_gaussian(x, sigma)) / 3.0 * 1.0  # Chung et al. 2024, algorithm 2, lines 4 to 6
    torch.testing.assert_close(result, expected)


def test_churn_raises_the_noise_and_its_settings_bound_it() -> None:
    x, sigmas = _start(), karras_sigmas(10, 0.03, HIGH)
    plain = samplers.sample_euler(denoise_two_peaks, x, sigmas, settings=SamplerSettings(), noise=one_stream())
    for settings, differs in ((SamplerSettings(s_churn=5.0), True), (SamplerSettings(s_churn=5.0, s_tmin=100.0), False)):
        churned = samplers.sample_euler(denoise_two_peaks, x, sigmas, settings=settings, noise=one_stream())
        assert torch.equal(churned, plain) != differs


def test_lagrange_integrals_are_those_of_adaptive_quadrature() -> None:
    nodes, start, stop = [3.0, 4.5, 7.0], 3.0, 1.2
    for coordinate in (lambda sigma: sigma, math.log, variance_preserving_time):
        times = [coordinate(node) for node in nodes]
        for index, weight in enumerate(integrate_lagrange(nodes, start, stop, coordinate)):

            def basis(sigma: float, index: int = index, times: list[float] = times, coordinate: Any = coordinate) -> float:
                others = [time for other, time in enumerate(times) if other != index]
                return float(np.prod([(coordinate(sigma) - time) / (times[index] - time) for time in others]))

            assert weight == pytest.approx(integrate.quad(basis, start, stop, epsrel=1e-12)[0], abs=1e-10)


def test_variance_preserving_time_spans_karras_range() -> None:
    assert variance_preserving_time(80.0) == pytest.approx(1.0)
    assert variance_preserving_time(0.002) == pytest.approx(1e-3)


@pytest.mark.parametrize("num_calls", range(1, 20))
def test_the_orders_of_dpm_fast_add_up(num_calls: int) -> None:
    orders = fast_orders(num_calls)
    assert sum(orders) == num_calls
    assert set(orders) <= {1, 2, 3}
    assert orders == sorted(orders, reverse=True)


def test_the_registry_is_the_contracts() -> None:
    assert NAMES == [
        "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler", "LMS", "Heun", "DPM2",
        "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "HeunPP2", "IPNDM", "IPNDM_V", "DEIS", "DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM", "DDPM",
    ]  # fmt: skip

    def having(option: str) -> set[str]:
        return {spec.name for spec in SAMPLERS if spec.options.get(option)}

    assert having("second_order") == {"DPM++ SDE", "DPM++ 2S a", "Heun", "DPM2", "DPM2 a", "Restart"}
    assert having("brownian_noise") == {"DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"}
    assert {spec.name: spec.resolve_schedule("Automatic") for spec in SAMPLERS if spec.options.get("scheduler")} == {
        **dict.fromkeys(["DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a", "Restart"], "karras"),
        **dict.fromkeys(["DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"], "exponential"),
    }


def test_names_aliases_and_schedules_resolve() -> None:
    assert find_sampler("k_euler_ancestral") is find_sampler("Euler a") is find_sampler("EULER A")
    assert find_sampler("DPM++ 2M").resolve_schedule(None) == "karras"
    assert find_sampler("DPM++ 2M").resolve_schedule("Simple") == "simple"
    assert find_sampler("Euler").resolve_schedule("automatic") == "automatic"
    unipc = find_sampler("UniPC")
    assert unipc.with_unipc_skip_type("logSNR").resolve_schedule("Automatic") == "exponential"
    assert unipc.with_unipc_skip_type("time_quadratic").compute_sigmas(None, 5, Prediction()).shape == (6,)
    assert find_sampler("Euler").with_unipc_skip_type("logSNR") is find_sampler("Euler")
    with pytest.raises(ValueError, match=r"Sampler 'Euler b' is unknown\. Use one of DPM"):
        find_sampler("Euler b")
    with pytest.raises(ValueError, match="'sideways'"):
        unipc.with_unipc_skip_type("sideways")


def test_the_penultimate_level_is_discarded_where_a_sampler_says_so() -> None:
    predictor = Prediction()
    full = compute_sigmas("karras", 11, predictor)
    assert torch.equal(find_sampler("DPM2").compute_sigmas("karras", 10, predictor), torch.cat([full[:-2], full[-1:]]))
    assert torch.equal(find_sampler("Euler").compute_sigmas("karras", 10, predictor, always_discard=True), torch.cat([full[:-2], full[-1:]]))
    assert find_sampler("Euler").compute_sigmas("karras", 10, predictor).shape == (11,)


def test_settings_and_schedules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="'bh3'"):
        SamplerSettings(uni_pc_variant="bh3")
    with pytest.raises(ValueError, match="order 0"):
        SamplerSettings(uni_pc_order=0)
    with pytest.raises(ValueError, match="at least two noise levels"):
        _run(find_sampler("Euler"), _start(), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="above 0"):
        _run(find_sampler("Euler"), _start(), torch.tensor([0.0, 0.0]))
