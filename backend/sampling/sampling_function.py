"""Guidance: turns conditions and a noisy batch into the denoised batch, with Forge's hooks around it; and the start and end of a sampling run.

Each condition becomes a branch (one pass over the whole batch of images). Branches with matching shapes run in one network call if memory allows.
Must not know prompts, samplers, options or pages.

Shapes: B batch, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backend import memory_management, profiler
from backend.nn.references import REFERENCES, shape_of_cost
from backend.parallel.running.session import SamplingRequest, SamplingSession, begin_session, end_session
from backend.patcher.controlnet_tasks import defer_control, list_deferrable
from backend.sampling.condition import Area, CompiledCondition, Condition, ConditionNoiseShape, compile_conditions, compile_weighted_conditions

if TYPE_CHECKING:
    from backend.modules.k_model import KModel
    from backend.patcher.unet import UnetPatcher

logger = logging.getLogger(__name__)

COND, UNCOND = 0, 1
FEATHER_ROWS = 8
LITTLE_FREE_BYTES = 1536 * 2**20
ModelOptions = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Branch:
    """One condition to run. `weight` is a number, (B, 1, 1, 1) or has the area's shape. `area` None means the whole picture."""

    kind: int
    input_BCHW: Tensor
    weight: float | Tensor
    conditions: dict[str, Condition]
    area: Area | None
    control: Any

    def fits(self, other: _Branch) -> bool:
        """Whether both can run in one network call."""
        return (
            self.input_BCHW.shape == other.input_BCHW.shape
            and self.control is other.control
            and self.conditions.keys() == other.conditions.keys()
            and all(condition.can_concat(other.conditions[name]) for name, condition in self.conditions.items())
        )


class _Mean:
    """Weighted mean of the outputs of all conditions of one kind (COND or UNCOND)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight: float | Tensor = 0.0

    def add(self, branch: _Branch, output_BCHW: Tensor, like_BCHW: Tensor) -> None:
        if branch.area is None:
            weighted = output_BCHW if isinstance(branch.weight, float) and branch.weight == 1.0 else output_BCHW * branch.weight
            self._sum, self._weight = weighted if self._sum is None else self._sum + weighted, self._weight + branch.weight
            return
        total = torch.zeros_like(like_BCHW) if self._sum is None else self._sum.clone()
        weight = self._weight * torch.ones_like(like_BCHW)
        place = _slices(branch.area)
        total[place] += output_BCHW * branch.weight
        weight[place] += branch.weight
        self._sum, self._weight = total, weight

    def result(self, like_BCHW: Tensor) -> Tensor:
        """The mean; zeros if nothing was added, and where no condition applies."""
        if self._sum is None:
            return torch.zeros_like(like_BCHW)
        if isinstance(self._weight, float):
            return self._sum if self._weight in (0.0, 1.0) else self._sum / self._weight
        return torch.where(self._weight == 0, self._sum, self._sum / torch.where(self._weight == 0, 1.0, self._weight))


# the step


def sampling_function(self: Any, denoiser_params: Any, cond_scale: float, cond_composition: Sequence[Sequence[tuple[int, float]]]) -> Any:
    """Forge's entry point. `self` is the caller's denoiser (with `inner_model` and `p`), `denoiser_params` has x, sigma, image_cond, text_cond and
    text_uncond. Returns (denoised, cond_pred, uncond_pred)."""
    engine = getattr(self.inner_model, "inner_model", self.inner_model)
    return denoise_guided(
        engine.forge_objects.unet,
        denoiser_params.x,
        denoiser_params.sigma,
        text_cond=denoiser_params.text_cond,
        text_uncond=denoiser_params.text_uncond,
        image_cond=denoiser_params.image_cond if getattr(engine, "is_inpaint", True) else None,
        cond_scale=cond_scale,
        cond_composition=cond_composition,
        seed=self.p.seeds[0],
        text_repeats=not getattr(getattr(engine, "family_facts", None), "attends_jointly", False),
    )


OnBranches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(cond_pred, uncond_pred), both x0 (B, C, H, W), to what is combined instead of them."""


def denoise_guided(
    unet: UnetPatcher,
    x_BCHW: Tensor,
    sigma_B: Tensor,
    *,
    text_cond: Tensor | Mapping[str, Tensor],
    text_uncond: Tensor | Mapping[str, Tensor] | None,
    cond_scale: float,
    cond_composition: Sequence[Sequence[tuple[int, float]]] | None = None,
    image_cond: Tensor | None = None,
    seed: int | None = None,
    on_branches: OnBranches | None = None,
    text_repeats: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(denoised, cond_pred, uncond_pred), all x0 (B, C, H, W) in fp32.

    `cond_composition`: per image its parts as (row of `text_cond`, weight); None means one row per image with weight 1. `image_cond` is concatenated
    to the latents' channels (inpainting models); pass None for other models. Its shape cannot tell, as a latent may have one row and one column.
    `text_repeats`: as `compile_conditions` takes it.
    """
    if cond_composition is None:
        cond = compile_conditions(text_cond, text_repeats=text_repeats)
    else:
        cond = compile_weighted_conditions(text_cond, cond_composition, text_repeats=text_repeats)
    uncond = compile_conditions(text_uncond, text_repeats=text_repeats)
    assert cond is not None
    every = [*cond, *(uncond or [])]
    concat = unet.extra_concat_condition if unet.extra_concat_condition is not None else image_cond
    if isinstance(concat, Tensor) and concat.ndim == 4 and concat.shape[0] in (1, x_BCHW.shape[0]) and concat.shape[2:] == x_BCHW.shape[2:]:
        for compiled in every:
            compiled["model_conds"]["c_concat"] = ConditionNoiseShape(concat)
    for name, latents in zip(REFERENCES, unet.reference_latents):
        for compiled in every:
            compiled["model_conds"][name] = Condition(latents)
    if unet.controlnet_linked_list is not None:
        for compiled in every:
            compiled["control"] = unet.controlnet_linked_list
    model, options = unet.model, unet.model_options
    for modify in options.get("conditioning_modifiers", ()):
        model, x_BCHW, sigma_B, uncond, cond, cond_scale, options, seed = modify(model, x_BCHW, sigma_B, uncond, cond, cond_scale, options, seed)
    guided = sampling_function_inner(model, x_BCHW, sigma_B, uncond, cond, cond_scale, options, seed, return_full=True, on_branches=on_branches)
    assert isinstance(guided, tuple)
    return guided


def sampling_function_inner(
    model: KModel,
    x: Tensor,
    timestep: Tensor,
    uncond: list[CompiledCondition] | None,
    cond: list[CompiledCondition],
    cond_scale: float,
    model_options: ModelOptions | None = None,
    seed: int | None = None,
    return_full: bool = False,
    on_branches: OnBranches | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Classifier-free guidance: uncond + scale * (cond - uncond) on x0. Ho and Salimans 2022, eq. 6.

    At scale 1 the unconditional branch is skipped, unless prompt weights do not sum to 1 or an extension requires it.
    Hooks: pre-CFG functions may change all inputs; a CFG function replaces the formula (it works on x minus prediction) and the family's rescaling;
    post-CFG functions may change the result.
    `return_full`: also return the predictions of both branches. The unconditional one is zeros if it did not run.
    `on_branches` may change both before they are combined; if the unconditional branch did not run it gets the conditional one twice.
    """
    options: ModelOptions = {} if model_options is None else model_options
    cut_short = math.isclose(cond_scale, 1.0) and _is_one(_total_strength(cond)) and not options.get("disable_cfg1_optimization", False)
    run_uncond = None if cut_short else uncond
    for before in options.get("sampler_pre_cfg_function", ()):
        model, cond, run_uncond, x, timestep, options = before(model, cond, run_uncond, x, timestep, options)
    cond_pred, uncond_pred = calc_cond_uncond_batch(model, cond, run_uncond, x, timestep, options)
    if on_branches is not None:
        cond_pred, changed_uncond = on_branches(cond_pred, cond_pred if run_uncond is None else uncond_pred)
        uncond_pred = uncond_pred if run_uncond is None else changed_uncond
    if "sampler_cfg_function" in options:
        result = _run_cfg_function(options, model, x, timestep, cond_scale, cond_pred, uncond_pred)
    elif run_uncond is None:
        result = cond_pred
    else:
        result = _compose(cond_pred, uncond_pred, cond_scale, _total_strength(cond))
        if (rescale := options.get("guidance_rescale")) is not None:
            result = rescale(x, cond_pred, result)
    for after in options.get("sampler_post_cfg_function", ()):
        result = after(
            {
                "denoised": result,
                "cond": cond,
                "uncond": uncond,
                "model": model,
                "uncond_denoised": uncond_pred,
                "cond_denoised": cond_pred,
                "sigma": timestep,
                "model_options": options,
                "input": x,
            }
        )
    return (result, cond_pred, uncond_pred) if return_full else result


def _total_strength(cond: Sequence[CompiledCondition]) -> float | Tensor:
    total: float | Tensor = 0.0
    for compiled in cond:
        total = total + compiled.get("strength", 1.0)
    return total


def _is_one(total: float | Tensor) -> bool:
    return math.isclose(total, 1.0) if isinstance(total, float) else bool((total == 1.0).all())


def _compose(cond_pred: Tensor, uncond_pred: Tensor, cond_scale: float, total: float | Tensor) -> Tensor:
    """uncond + scale * sum of weights * (weighted mean of the parts - uncond). Liu et al. 2022, "Compositional Visual Generation", eq. 11.

    `total` is the sum of weights. Where it is zero, `cond_pred` is the plain weighted sum, in which uncond cancels.
    """
    if _is_one(total):
        return uncond_pred + (cond_pred - uncond_pred) * cond_scale
    if isinstance(total, Tensor):
        total = total.to(cond_pred)
        return uncond_pred + torch.where(total == 0, cond_pred, (cond_pred - uncond_pred) * total) * cond_scale
    return uncond_pred + (cond_pred if total == 0 else (cond_pred - uncond_pred) * total) * cond_scale


def _run_cfg_function(
    options: ModelOptions, model: KModel, x: Tensor, timestep: Tensor, cond_scale: float, cond_pred: Tensor, uncond_pred: Tensor
) -> Tensor:
    arguments = {
        "cond": x - cond_pred,
        "uncond": x - uncond_pred,
        "cond_scale": cond_scale,
        "timestep": timestep,
        "input": x,
        "sigma": timestep,
        "cond_denoised": cond_pred,
        "uncond_denoised": uncond_pred,
        "model": model,
        "model_options": options,
    }
    change: Tensor = options["sampler_cfg_function"](arguments)
    return x - change


# branches


def calc_cond_uncond_batch(
    model: KModel,
    cond: Sequence[CompiledCondition],
    uncond: Sequence[CompiledCondition] | None,
    x_in: Tensor,
    timestep: Tensor,
    model_options: ModelOptions,
) -> tuple[Tensor, Tensor]:
    """x0 for cond and uncond, each the weighted mean over its conditions. Zeros for one that is None. Raises: OutOfMemory."""
    waiting = [_make_branch(kind, one, x_in, timestep) for kind, conditions in ((COND, cond), (UNCOND, uncond or ())) for one in conditions]
    branches = [branch for branch in waiting if branch is not None]
    means = {COND: _Mean(), UNCOND: _Mean()}
    while branches:
        batch = _pick_batch(model, branches, x_in.device)
        outputs = _run_batch(model, batch, timestep, model_options)
        for branch, output_BCHW in zip(batch, outputs):
            means[branch.kind].add(branch, output_BCHW, x_in)
        branches = [branch for branch in branches if branch not in batch]
    return means[COND].result(x_in), means[UNCOND].result(x_in)


def _make_branch(kind: int, compiled: CompiledCondition, x_BCHW: Tensor, sigma_B: Tensor) -> _Branch | None:
    """The branch for a condition; None if the condition does not apply at this noise level."""
    sigma = float(sigma_B[0]) if "timestep_start" in compiled or "timestep_end" in compiled else 0.0
    if sigma > compiled.get("timestep_start", math.inf) or sigma < compiled.get("timestep_end", 0.0):
        return None
    area: Area | None = compiled.get("area")
    part_BCHW = x_BCHW if area is None else x_BCHW[_slices(area)]
    size_area = area or (x_BCHW.shape[2], x_BCHW.shape[3], 0, 0)
    conditions = {
        name: condition.process_cond(batch_size=x_BCHW.shape[0], device=x_BCHW.device, area=size_area)
        for name, condition in compiled["model_conds"].items()
    }
    return _Branch(kind, part_BCHW, _weigh(compiled, x_BCHW, part_BCHW), conditions, area, compiled.get("control"))


def _weigh(compiled: CompiledCondition, x_BCHW: Tensor, part_BCHW: Tensor) -> float | Tensor:
    """The condition's strength, times its mask or, without one, times a ramp at the area's edges inside the picture."""
    strength, area = compiled.get("strength", 1.0), compiled.get("area")
    strength = strength.to(x_BCHW) if isinstance(strength, Tensor) else float(strength)
    mask_BHW: Tensor | None = compiled.get("mask")
    if mask_BHW is not None:
        if mask_BHW.shape[1:] != x_BCHW.shape[2:]:
            raise ValueError(
                f"A condition's mask has {tuple(mask_BHW.shape[1:])} rows and columns, the latents {tuple(x_BCHW.shape[2:])}. Resize the mask."
            )
        rows = slice(None) if area is None else slice(area[2], area[2] + area[0])
        columns = slice(None) if area is None else slice(area[3], area[3] + area[1])
        cut = mask_BHW[:, rows, columns].to(x_BCHW).unsqueeze(1) * compiled.get("mask_strength", 1.0)
        weighted: Tensor = cut * strength
        return weighted
    return strength if area is None else _feather(area, x_BCHW, part_BCHW) * strength


def _feather(area: Area, x_BCHW: Tensor, part_BCHW: Tensor) -> Tensor:
    """Ones, with ramps at the edges that are not on the picture's edge."""
    ramps = []
    for dim in (0, 1):
        length, start, whole = area[dim], area[2 + dim], x_BCHW.shape[2 + dim]
        places = torch.arange(length, device=x_BCHW.device, dtype=x_BCHW.dtype)
        from_start = (places + 1) / FEATHER_ROWS if start > 0 else torch.ones_like(places)
        from_end = (length - places) / FEATHER_ROWS if start + length < whole else torch.ones_like(places)
        ramps.append(torch.minimum(from_start, from_end).clamp(max=1.0))
    return (ramps[0].view(-1, 1) * ramps[1]).expand(part_BCHW.shape)


def _slices(area: Area) -> tuple[slice, slice, slice, slice]:
    return slice(None), slice(None), slice(area[2], area[2] + area[0]), slice(area[3], area[3] + area[1])


def _pick_batch(model: KModel, branches: Sequence[_Branch], device: torch.device) -> list[_Branch]:
    """As many branches that fit the first one as memory allows, the last conditions first (so uncond comes before cond)."""
    fitting = [branch for branch in reversed(branches) if branch.fits(branches[0])]
    if len(fitting) == 1 or model.runner is not None:
        return fitting  # a plan deals rows to slots itself
    free_bytes = memory_management.get_free_memory(device)
    references = [condition.cond for name, condition in fitting[0].conditions.items() if name in REFERENCES]
    shape = shape_of_cost(fitting[0].input_BCHW.shape, references)
    for parts in range(1, len(fitting)):
        count = len(fitting) // parts
        if model.memory_required([count * shape[0], *shape[1:]]) < free_bytes:
            return fitting[:count]
    return fitting[:1]


def _run_batch(model: KModel, batch: Sequence[_Branch], sigma_B: Tensor, options: ModelOptions) -> list[Tensor]:
    """Outputs of the branches, run together; one by one after an out-of-memory error, freeing more each time. Raises: OutOfMemory."""
    device = batch[0].input_BCHW.device
    if len(batch) == 1:
        return [memory_management.run_with_recovery(lambda: _call_model(model, batch, sigma_B, options), what="denoising a step", device=device)]
    try:
        return list(_call_model(model, batch, sigma_B, options).chunk(len(batch)))
    except torch.OutOfMemoryError:
        logger.info("%s ran out of memory with %d conditions at once; running them one by one.", device, len(batch))
    memory_management.soft_empty_cache(force=True)
    return [output for branch in batch for output in _run_batch(model, [branch], sigma_B, options)]


def _call_model(model: KModel, batch: Sequence[_Branch], sigma_B: Tensor, options: ModelOptions) -> Tensor:
    kinds = [branch.kind for branch in batch]
    x_BCHW = torch.cat([branch.input_BCHW for branch in batch]) if len(batch) > 1 else batch[0].input_BCHW
    timestep_B = torch.cat([sigma_B] * len(batch)) if len(batch) > 1 else sigma_B
    arguments: dict[str, Any] = {
        name: condition.concat([branch.conditions[name] for branch in batch[1:]]) for name, condition in batch[0].conditions.items()
    }
    transformer_options = arguments["transformer_options"] = _describe_batch(options, kinds, sigma_B)
    control = batch[0].control
    if control is not None:
        link = control
        while link is not None:
            link.transformer_options = transformer_options
            link = link.previous_controlnet
        arguments["control"] = _find_control(model, control, x_BCHW, timestep_B, dict(arguments), len(batch), options)
        arguments["control_model"] = control
    wrapper = options.get("model_function_wrapper")
    if wrapper is None:
        return model.apply_model(x_BCHW, timestep_B, **arguments)
    output: Tensor = wrapper(model.apply_model, {"input": x_BCHW, "timestep": timestep_B, "c": arguments, "cond_or_uncond": kinds})
    return output


def _find_control(
    model: KModel, control: Any, x_BCHW: Tensor, sigma_B: Tensor, arguments: dict[str, Any], num_branches: int, options: ModelOptions
) -> Any:
    """Residuals of a chain; deferred if the current plan computes them on other slots or in parallel with the denoiser."""
    if model.deferred_networks:
        links = list_deferrable(control, options)
        if links and all(link.control_model in model.deferred_networks for link in links):
            return defer_control(control, x_BCHW, sigma_B, arguments, num_branches)
    with profiler.recorder().measure("ControlNet", "ControlNet", device=x_BCHW.device):
        return control.get_control(x_BCHW, sigma_B, arguments, num_branches)


def _describe_batch(options: ModelOptions, kinds: list[int], sigma_B: Tensor) -> dict[str, Any]:
    """Transformer options describing the batch: `cond_or_uncond` per branch, the rest per row. `picture_indices` are positions in the batch."""
    batch_size = sigma_B.shape[0]
    row_kinds = [kind for kind in kinds for _ in range(batch_size)]
    return {
        **options.get("transformer_options", {}),
        "cond_or_uncond": kinds,
        "sigmas": sigma_B,
        "cond_mark": torch.tensor(row_kinds, device=sigma_B.device, dtype=sigma_B.dtype),
        "cond_indices": [row for row, kind in enumerate(row_kinds) if kind == COND],
        "uncond_indices": [row for row, kind in enumerate(row_kinds) if kind == UNCOND],
        "picture_indices": [*range(batch_size)] * len(kinds),
    }


# a sampling run


def sampling_prepare(unet: UnetPatcher, x: Tensor, request: SamplingRequest | None = None) -> SamplingSession | None:
    """Load the denoiser and its extra models, with room for cond and uncond at once, and give ControlNets the noise levels.

    With several slots a plan decides where; `request` describes the run for it. Returns the session that carries out the plan, or None with one
    slot. Raises: OutOfMemory.
    """
    batch, channels, height, width = x.shape
    request = request or SamplingRequest(images=batch)
    kept_bytes, extra_models = unet.extra_preserved_memory_during_sampling, list(unet.extra_model_patchers_during_sampling)
    chain = unet.controlnet_linked_list
    controls = list_deferrable(chain, unet.model_options)
    if chain is not None:
        kept_bytes += int(chain.inference_memory_requirements(unet.model_dtype()))
        extra_models += [patcher for patcher in chain.get_models() if not any(patcher.is_clone(link.control_model_wrapped) for link in controls)]
    session = begin_session(unet, x.shape, request, extra_models=extra_models, controls=controls, preserved_bytes=kept_bytes)
    if session is None:
        extra_models += [link.control_model_wrapped for link in controls]
        estimate = unet.model_options.get("memory_peak_estimation_modifier", unet.memory_required)
        need_bytes = estimate(list(unet.shape_of_cost([2 * batch, channels, height, width])))
        memory_management.load_models_gpu(models=[unet, *extra_models], memory_required=int(need_bytes), hard_memory_preservation=kept_bytes)
        memory_management.hold_models([unet, *extra_models])
    _warn_of_little_memory(unet.load_device)
    for control in unet.list_controlnets():
        control.pre_run(unet.model, unet.model.predictor.percent_to_sigma)
    return session


def _warn_of_little_memory(device: torch.device) -> None:
    if device.type != "cuda" or memory_management.current_store().config.disable_gpu_warning:
        return
    free_bytes = memory_management.get_free_memory(device)
    if free_bytes < LITTLE_FREE_BYTES:
        logger.warning(
            "%s has %.0f MiB free for denoising, which may be slow. Lower GPU Weights, the size or the batch. --disable-gpu-warning hides this.",
            device, free_bytes / 2**20,
        )  # fmt: skip


def sampling_cleanup(unet: UnetPatcher) -> None:
    """End the plan, allow models to be evicted again, and let ControlNets drop what they kept for the run."""
    end_session(unet)
    memory_management.hold_models([])
    for control in unet.list_controlnets():
        control.cleanup()
