"""Guidance: turns conditions and a noisy batch into the denoised batch, with Forge's hooks around it; and the start and end of a sampling run.

Each condition becomes a branch (one pass over the whole batch of images). Branches with matching shapes run in one network call if memory allows.
Must not know prompts, samplers, options or pages.

Shapes: B batch, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from backend import memory_management, profiler
from backend.nn.references import REFERENCES, shape_of_cost
from backend.parallel.running.session import SamplingRequest, SamplingSession, begin_recording, begin_session, end_session
from backend.patcher.controlnet_tasks import defer_control, list_deferrable
from backend.sampling.branches import COND, UNCOND, Branch, CallPlan, Mean, StepMemory, like_latents, make_branch, plan_call
from backend.sampling.condition import CompiledCondition, Condition, ConditionNoiseShape, compile_conditions, compile_weighted_conditions

if TYPE_CHECKING:
    from backend.modules.k_model import KModel
    from backend.patcher.unet import UnetPatcher

logger = logging.getLogger(__name__)

LITTLE_FREE_BYTES = 1536 * 2**20
ModelOptions = dict[str, Any]
MAY_CHANGE_CONDITIONS = (
    "conditioning_modifiers",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "model_function_wrapper",
)
"""Hooks that get a step's conditions or tensors and may change them in place: with one of them, every step gets its own."""


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
    memory: StepMemory | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(denoised, cond_pred, uncond_pred), all x0 (B, C, H, W) in fp32.

    `cond_composition`: per image its parts as (row of `text_cond`, weight); None means one row per image with weight 1. `image_cond` is concatenated
    to the latents' channels (inpainting models); pass None for other models. Its shape cannot tell, as a latent may have one row and one column.
    `text_repeats`: as `compile_conditions` takes it. `memory`: the caller's, of earlier steps of the same run; what they prepared from the same
    tensors is used again, unless a hook may have changed it.
    """
    model, options = unet.model, unet.model_options
    concat = unet.extra_concat_condition if unet.extra_concat_condition is not None else image_cond
    parts = _Parts(text_cond, text_uncond, cond_composition, concat, unet.controlnet_linked_list, tuple(unet.reference_latents), text_repeats)
    if memory is None or any(map(options.get, MAY_CHANGE_CONDITIONS)):
        memory = StepMemory()
    inputs = (model, *parts.references, *parts[:5])
    cond, uncond = memory.find("conditions", inputs, (text_repeats, x_BCHW.shape), partial(_compile, parts, x_BCHW.shape))
    for modify in options.get("conditioning_modifiers", ()):
        model, x_BCHW, sigma_B, uncond, cond, cond_scale, options, seed = modify(model, x_BCHW, sigma_B, uncond, cond, cond_scale, options, seed)
    guided = sampling_function_inner(
        model, x_BCHW, sigma_B, uncond, cond, cond_scale, options, seed, return_full=True, on_branches=on_branches, memory=memory
    )  # fmt: skip
    assert isinstance(guided, tuple)
    return guided


class _Parts(NamedTuple):
    """What a step's conditions are made of."""

    text_cond: Tensor | Mapping[str, Tensor]
    text_uncond: Tensor | Mapping[str, Tensor] | None
    composition: Sequence[Sequence[tuple[int, float]]] | None
    concat: Tensor | None
    control: Any
    references: tuple[Tensor, ...]
    text_repeats: bool


def _compile(parts: _Parts, shape: torch.Size) -> tuple[list[CompiledCondition], list[CompiledCondition] | None]:
    """Conditions of the prompts and of the negative prompts, for latents of `shape` (B, C, H, W)."""
    if parts.composition is None:
        cond = compile_conditions(parts.text_cond, text_repeats=parts.text_repeats)
    else:
        cond = compile_weighted_conditions(parts.text_cond, parts.composition, text_repeats=parts.text_repeats)
    uncond = compile_conditions(parts.text_uncond, text_repeats=parts.text_repeats)
    assert cond is not None
    concat = parts.concat
    takes_concat = isinstance(concat, Tensor) and concat.ndim == 4 and concat.shape[0] in (1, shape[0]) and concat.shape[2:] == shape[2:]
    for compiled in (*cond, *(uncond or ())):
        if takes_concat:
            compiled["model_conds"]["c_concat"] = ConditionNoiseShape(concat)
        for name, latents in zip(REFERENCES, parts.references):
            compiled["model_conds"][name] = Condition(latents)
        if parts.control is not None:
            compiled["control"] = parts.control
    return cond, uncond


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
    memory: StepMemory | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Classifier-free guidance: uncond + scale * (cond - uncond) on x0. Ho and Salimans 2022, eq. 6.

    At scale 1 the unconditional branch is skipped, unless prompt weights do not sum to 1 or an extension requires it.
    Hooks: pre-CFG functions may change all inputs; a CFG function replaces the formula (it works on x minus prediction) and the family's rescaling;
    post-CFG functions may change the result.
    `return_full`: also return the predictions of both branches. The unconditional one is zeros if it did not run.
    `on_branches` may change both before they are combined; if the unconditional branch did not run it gets the conditional one twice.
    `memory`: as in `denoise_guided`.
    """
    options: ModelOptions = {} if model_options is None else model_options
    cut_short = math.isclose(cond_scale, 1.0) and _is_one(_total_strength(cond)) and not options.get("disable_cfg1_optimization", False)
    run_uncond = None if cut_short else uncond
    for before in options.get("sampler_pre_cfg_function", ()):
        model, cond, run_uncond, x, timestep, options = before(model, cond, run_uncond, x, timestep, options)
    memory, facts = memory or StepMemory(), (x.shape, x.dtype, x.device)
    calls = memory.find("calls", (model, cond, run_uncond), facts, partial(_plan_calls, model, cond, run_uncond, x, timestep))
    cond_pred, uncond_pred = _run_calls(model, calls, x, timestep, options)
    if on_branches is not None:
        cond_pred, changed_uncond = on_branches(cond_pred, cond_pred if run_uncond is None else uncond_pred)
        uncond_pred = uncond_pred if run_uncond is None else changed_uncond
    if "sampler_cfg_function" in options:
        result = _run_cfg_function(options, model, x, timestep, cond_scale, cond_pred, uncond_pred)
    elif run_uncond is None:
        result = cond_pred
    else:
        total = memory.find("total", (cond,), (x.device,), partial(_total_strength, cond, cond_pred))
        result = _compose(cond_pred, uncond_pred, cond_scale, total)
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


def _total_strength(cond: Sequence[CompiledCondition], like: Tensor | None = None) -> float | Tensor:
    """Sum of the parts' weights: 1.0 if it is one for every image, else a number or (B, 1, 1, 1), on the device and in the type of `like`."""
    total: float | Tensor = 0.0
    for compiled in cond:
        total = total + compiled.get("strength", 1.0)
    if _is_one(total):
        return 1.0
    return like_latents(total, like) if isinstance(total, Tensor) and like is not None else total


def _is_one(total: float | Tensor) -> bool:
    return math.isclose(total, 1.0) if isinstance(total, float) else bool((total == 1.0).all())


def _compose(cond_pred: Tensor, uncond_pred: Tensor, cond_scale: float, total: float | Tensor) -> Tensor:
    """uncond + scale * sum of weights * (weighted mean of the parts - uncond). Liu et al. 2022, "Compositional Visual Generation", eq. 11.

    `total` is the sum of weights. Where it is zero, `cond_pred` is the plain weighted sum, in which uncond cancels.
    """
    if isinstance(total, Tensor):
        return uncond_pred + torch.where(total == 0, cond_pred, (cond_pred - uncond_pred) * total) * cond_scale
    if total == 1.0:
        return uncond_pred + (cond_pred - uncond_pred) * cond_scale
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
    return _run_calls(model, _plan_calls(model, cond, uncond, x_in, timestep), x_in, timestep, model_options)


def _plan_calls(
    model: KModel, cond: Sequence[CompiledCondition], uncond: Sequence[CompiledCondition] | None, x_BCHW: Tensor, sigma_B: Tensor
) -> list[CallPlan]:
    """The network calls that run all conditions which apply at this noise level. Raises: OutOfMemory."""
    plan = partial(_plan_calls_here, model, cond, uncond, x_BCHW, sigma_B)
    return memory_management.run_with_recovery(plan, what="preparing the conditions", device=x_BCHW.device)


def _plan_calls_here(
    model: KModel, cond: Sequence[CompiledCondition], uncond: Sequence[CompiledCondition] | None, x_BCHW: Tensor, sigma_B: Tensor
) -> list[CallPlan]:
    waiting = [make_branch(kind, one, x_BCHW, sigma_B) for kind, conditions in ((COND, cond), (UNCOND, uncond or ())) for one in conditions]
    branches, calls = [branch for branch in waiting if branch is not None], []
    while branches:
        batch = _pick_batch(model, branches, x_BCHW.device)
        calls.append(plan_call(batch, sigma_B))
        branches = [branch for branch in branches if branch not in batch]
    return calls


def _run_calls(model: KModel, calls: list[CallPlan], x_BCHW: Tensor, sigma_B: Tensor, options: ModelOptions) -> tuple[Tensor, Tensor]:
    """Means of the calls' outputs. A call without room is divided into its branches for the rest of the run. Raises: OutOfMemory."""
    means: tuple[Mean, Mean] | None = None
    done = 0
    while done < len(calls):
        call = calls[done]
        try:
            outputs = _run_call(model, call, x_BCHW, sigma_B, options)
        except torch.OutOfMemoryError:
            if len(call.branches) == 1:
                raise
            calls[done : done + 1] = _divide(call, sigma_B)
            continue
        done += 1
        if call.is_plain and len(calls) == 1:
            found = dict(zip(call.kinds, outputs))
            nothing_BCHW = x_BCHW if len(found) == 2 else torch.zeros_like(x_BCHW)
            return found.get(COND, nothing_BCHW), found.get(UNCOND, nothing_BCHW)
        means = means or (Mean(), Mean())
        for branch, output_BCHW in zip(call.branches, outputs):
            means[branch.kind].add(branch, output_BCHW, x_BCHW)
    means = means or (Mean(), Mean())
    return means[COND].result(x_BCHW), means[UNCOND].result(x_BCHW)


def _divide(call: CallPlan, sigma_B: Tensor) -> list[CallPlan]:
    """Calls with one branch each that take a call's place."""
    logger.info("%s ran out of memory with %d conditions at once; running them one by one.", sigma_B.device, len(call.branches))
    memory_management.soft_empty_cache(force=True)
    plan = partial(_plan_each, call, sigma_B)
    return memory_management.run_with_recovery(plan, what="preparing the conditions", device=sigma_B.device)


def _plan_each(call: CallPlan, sigma_B: Tensor) -> list[CallPlan]:
    return [plan_call([branch], sigma_B) for branch in call.branches]


def _pick_batch(model: KModel, branches: Sequence[Branch], device: torch.device) -> list[Branch]:
    """As many branches that fit the first one as memory allows, the last conditions first (so uncond comes before cond)."""
    fitting = [branch for branch in reversed(branches) if branch.fits(branches[0])]
    if len(fitting) == 1 or model.runner is not None:
        return fitting  # a plan deals rows to slots itself
    free_bytes = memory_management.get_free_memory(device)
    references = [condition.cond for name, condition in fitting[0].conditions.items() if name in REFERENCES]
    shape = shape_of_cost(fitting[0].shape, references)
    for parts in range(1, len(fitting)):
        count = len(fitting) // parts
        if model.memory_required([count * shape[0], *shape[1:]]) < free_bytes:
            return fitting[:count]
    return fitting[:1]


def _run_call(model: KModel, call: CallPlan, x_BCHW: Tensor, sigma_B: Tensor, options: ModelOptions) -> Sequence[Tensor]:
    """Outputs of a call's branches. Raises: OutOfMemory for one branch that has no room, torch.OutOfMemoryError for several."""
    count = len(call.branches)
    if count > 1:
        return _call_model(model, call, x_BCHW, sigma_B, options).chunk(count)
    try:
        return (_call_model(model, call, x_BCHW, sigma_B, options),)
    except RuntimeError as error:
        if not memory_management.is_out_of_memory(error):
            raise
    run = partial(_call_model, model, call, x_BCHW, sigma_B, options)
    return (memory_management.run_with_recovery(run, what="denoising a step", device=x_BCHW.device),)


def _call_model(model: KModel, call: CallPlan, x_BCHW: Tensor, sigma_B: Tensor, options: ModelOptions) -> Tensor:
    branches, count = call.branches, len(call.branches)
    if count == 1:
        rows_BCHW, timestep_B = branches[0].part_of(x_BCHW), sigma_B
    else:
        rows_BCHW = torch.cat([x_BCHW] * count if call.repeats_whole else [branch.part_of(x_BCHW) for branch in branches])
        timestep_B = torch.cat([sigma_B] * count)
    transformer_options = {**options.get("transformer_options", {}), **call.described, "sigmas": sigma_B}
    arguments = {**call.arguments, "transformer_options": transformer_options}
    control = branches[0].control
    if control is not None:
        link = control
        while link is not None:
            link.transformer_options = transformer_options
            link = link.previous_controlnet
        arguments["control"] = _find_control(model, control, rows_BCHW, timestep_B, dict(arguments), count, options)
        arguments["control_model"] = control
    wrapper = options.get("model_function_wrapper")
    if wrapper is None:
        return model.apply_model(rows_BCHW, timestep_B, **arguments)
    output: Tensor = wrapper(model.apply_model, {"input": rows_BCHW, "timestep": timestep_B, "c": arguments, "cond_or_uncond": call.kinds})
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
        begin_recording(unet.model.program, request)
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
