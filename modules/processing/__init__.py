"""Turns a request into finished pictures: `process_images(p)`. The names that the page, the API and extensions import are here.

Reading order: `request` (what a user asks for; `p`), `validation` (ranges, names), `conditions` (encodes prompts), `networks` (applies the
networks named in prompts), `txt2img` or `img2img` (sample one batch), `hires` and `refiner` (a second pass, a second model), `latents`
(converts between pixels and latents), `compositing` (masks, pasting back), `pictures` (infotext, saving, grid), `result` (`Processed`).
The rest: `chosen_script`, `constants`, `image_conditions`, `model_facts`, `nans`,
`overrides` (methods that an extension may have replaced), `saving`, `tiling`.

Example: `process_images(StableDiffusionProcessingTxt2Img(prompt="a cat", steps=20))` validates the request, loads its checkpoint, and for
each batch runs `conditions.setup_conditions(p)` and `txt2img.sample_txt2img(p, ...)`, decodes, and passes the pictures to
`PictureCollector`, which saves them. Add a new request field to `request`, and its effect to the file of the step it changes.

Importing this package is cheap: what needs torch is imported when a job runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modules.errors import RequestError
from modules.jobs.context import JobContext
from modules.jobs.queue import queue_lock
from modules.launch.version import program_version
from modules.processing.constants import LATENT_UPSCALE_MODES, opt_C, opt_f
from modules.processing.overrides import overridden, step_of
from modules.processing.request import (
    StableDiffusionProcessing,
    StableDiffusionProcessingImg2Img,
    StableDiffusionProcessingTxt2Img,
)
from modules.processing.result import Processed, create_infotext, process_extra_images
from modules.settings.options import active_overrides, write_text_atomically

if TYPE_CHECKING:
    from modules.processing.pictures import PictureCollector

log = logging.getLogger(__name__)

__all__ = [
    "LATENT_UPSCALE_MODES",
    "Processed",
    "StableDiffusionProcessing",
    "StableDiffusionProcessingImg2Img",
    "StableDiffusionProcessingTxt2Img",
    "create_infotext",
    "opt_C",
    "opt_f",
    "process_extra_images",
    "process_images",
    "process_images_inner",
    "program_version",
]

MIB = 2**20

# names that extensions import from here -> the file that defines them
_ELSEWHERE = {
    "get_fixed_seed": "processing.validation",
    "fix_seed": "processing.validation",
    "decode_latent_batch": "processing.latents",
    "DecodedSamples": "processing.latents",
    "apply_overlay": "processing.compositing",
    "uncrop": "processing.compositing",
    "apply_color_correction": "processing.compositing",
    "setup_color_correction": "processing.compositing",
    "create_binary_mask": "processing.compositing",
    "old_hires_fix_first_pass_dimensions": "processing.compositing",
    "txt2img_image_conditioning": "processing.latents",
    "create_random_tensors": "samplers.noise",
}


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # only when one of these names is used

    return getattr(importlib.import_module(f"modules.{_ELSEWHERE[name]}"), name)


def process_images(p: StableDiffusionProcessing) -> Processed:
    """Run the request: load its model, make its pictures, save them. Raises RequestError if it cannot be done.

    Runs on the calling thread, one job at a time; the page and the API call it from the job worker. The front of a cluster has another machine
    do it."""
    if p.context.remote_engine is not None:
        processed: Processed = p.context.remote_engine.process(p)
        return processed
    from backend import memory_management, profiler  # these import torch, as does the sampler list
    from backend.parallel.running.lost_slots import dropping_dead_slots
    from modules.jobs.observer import JobObserver
    from modules.processing.latents import latent_format_of
    from modules.processing.validation import fit_size_to_model, validate_request

    context = p.context
    with queue_lock, _as_job(context), JobObserver(p, context):
        p.run_hook("before_process")
        validate_request(p, context)
        token = active_overrides.set({**active_overrides.get(), **p.override_settings})
        try:
            memory_management.set_inference_memory(int(p.options.forge_inference_memory) * MIB)
            with dropping_dead_slots(), memory_management.explaining_shortages("making the picture"):
                with profiler.recorder().measure("load", "load the model"):
                    p.sd_model = context.models.ensure_loaded(p.options)
                fit_size_to_model(p, latent_format_of(p.sd_model))
                return process_images_inner(p)
        finally:
            active_overrides.reset(token)
            keep_overrides(p, context)
            memory_management.release_after_job()


@contextlib.contextmanager
def _as_job(context: JobContext) -> Iterator[None]:
    """If no job is running (an extension calls from its own thread), make this call one."""
    state = context.state
    if state.job:
        yield
        return
    state.begin("process_images")
    try:
        yield
    finally:
        state.end()


def keep_overrides(p: StableDiffusionProcessing, context: JobContext) -> None:
    """override_settings_restore_afterwards=False turns the overrides into the current settings (in memory only, until they are saved)."""
    if p.override_settings_restore_afterwards:
        return
    for key, value in p.override_settings.items():
        if key in context.options.data_labels:
            context.options.set(key, value, is_api=True)


def process_images_inner(p: StableDiffusionProcessing) -> Processed:
    """The job itself. The request is valid and its model is loaded."""
    import torch  # heavy; only needed when a job runs

    from modules.processing.conditions import keep_networks_apart, setup_prompts
    from modules.processing.nans import explaining_nans
    from modules.processing.networks import deactivate_networks
    from modules.processing.pictures import PictureCollector
    from modules.processing.validation import fix_seed, set_all_seeds

    context, started = p.context, time.perf_counter()
    p.seed, p.subseed = _own_seed(p.seed), _own_seed(p.subseed)
    fix_seed(p)
    _describe_model(p, context)
    set_folders(p)
    step_of(p, "setup_prompts", setup_prompts)()
    set_all_seeds(p)
    p.run_hook("process")
    keep_networks_apart(p)
    collector = PictureCollector(p, context.state)
    with torch.no_grad(), explaining_nans(p):
        _prepare(p)
        try:
            _run_batches(p, context, collector)
        except BaseException:
            collector.saver.wait()
            raise
        finally:
            deactivate_networks(p)
    processed = collector.finish()
    p.close()
    p.run_hook_with("postprocess", processed)
    _log_job(p, len(collector.images) - processed.index_of_first_image, time.perf_counter() - started)
    return processed


def _log_job(p: StableDiffusionProcessing, num_pictures: int, seconds: float) -> None:
    from modules.jobs.observer import describe_cost  # imports torch

    kind = "img2img" if isinstance(p, StableDiffusionProcessingImg2Img) else "txt2img"
    pictures = "1 picture" if num_pictures == 1 else f"{num_pictures} pictures"
    cost = describe_cost(seconds)
    log.info("%s: %s, %dx%d, %s, %d steps, in %s.", kind, pictures, p.width, p.height, p.sampler_name, p.steps, cost)


def _own_seed(seed: Any) -> Any:
    return list(seed) if isinstance(seed, (list, tuple)) else seed


def _describe_model(p: StableDiffusionProcessing, context: JobContext) -> None:
    """Model names and hashes for infotexts."""
    from modules.processing.refiner import note_refiner  # imports torch

    request = context.models.request
    if request is None:
        raise RequestError("no model is loaded.")
    checkpoint = request.checkpoint
    p.sd_model_name, p.sd_model_hash = checkpoint.name_for_extra, checkpoint.shorthash
    p.additional_module_names = [path.stem for path in request.additional_modules]
    vae = next((path for path in request.additional_modules if path in context.additional_modules.vaes.values()), None)
    note_refiner(p)
    p.sd_vae_name = vae.name if vae is not None else None
    p.sd_vae_hash = (context.hashes.sha256(vae, f"vae/{vae.name}") or "")[:10] or None if vae is not None else None


def set_folders(p: StableDiffusionProcessing) -> None:
    """Where its pictures are saved, unless the request says so."""
    options, kind = p.options, "img2img" if isinstance(p, StableDiffusionProcessingImg2Img) else "txt2img"
    p.outpath_samples = p.outpath_samples or options.outdir_samples or options[f"outdir_{kind}_samples"]
    p.outpath_grids = p.outpath_grids or options.outdir_grids or options[f"outdir_{kind}_grids"]


def _run_batches(p: StableDiffusionProcessing, context: JobContext, collector: PictureCollector) -> None:
    state = context.state
    if state.job_count == -1:
        state.job_count = p.n_iter
    for iteration in range(p.n_iter):
        state.skipped = False
        if state.interrupted or state.stopping_generation:
            break
        p.iteration = iteration
        if p.n_iter > 1:
            state.job = f"Batch {iteration + 1} out of {p.n_iter}"
        if not _run_batch(p, context, collector):
            break
        state.nextjob()


def _run_batch(p: StableDiffusionProcessing, context: JobContext, collector: PictureCollector) -> bool:
    """Run one batch from prompts to pictures; False if no prompts are left for it."""
    from modules.processing.conditions import parse_extra_network_prompts, setup_conditions
    from modules.processing.latents import decode_latent_batch, latent_format_of
    from modules.processing.networks import activate_networks
    from modules.processing.validation import fit_size_to_model
    from modules.scripts.hook_arguments import PostSampleArgs

    p.sd_model = context.models.ensure_loaded(p.options)
    fit_size_to_model(p, latent_format_of(p.sd_model))
    _set_batch(p)
    if not p.prompts:
        return False
    hook_values = {"batch_number": p.iteration, "prompts": p.prompts, "seeds": p.seeds, "subseeds": p.subseeds}
    p.run_hook("before_process_batch", **hook_values)
    step_of(p, "parse_extra_network_prompts", parse_extra_network_prompts)()
    activate_networks(p, p.extra_network_data)
    p.run_hook("process_batch", **hook_values)
    step_of(p, "setup_conds", setup_conditions)()
    if p.iteration == 0:
        write_params(context, collector.infotext(0))
    sampled = PostSampleArgs(_sample(p))
    p.run_hook_with("post_sample", sampled)
    samples = sampled.samples
    decoded = samples if getattr(samples, "already_decoded", False) else decode_latent_batch(p.sd_model, samples, check_for_nans=True)
    collector.add_batch(decoded)
    return True


def _prepare(p: StableDiffusionProcessing) -> None:
    """What all batches share."""
    prepare = overridden(p, "init")
    if prepare is not None:
        prepare(p.all_prompts, p.all_seeds, p.all_subseeds)
    elif isinstance(p, StableDiffusionProcessingImg2Img):
        from modules.processing.img2img import prepare_img2img  # imports torch

        prepare_img2img(p)
    elif isinstance(p, StableDiffusionProcessingTxt2Img):
        from modules.processing.txt2img import prepare_txt2img  # imports torch

        prepare_txt2img(p)


def _sample(p: StableDiffusionProcessing) -> Any:
    """Latents of one batch, or decoded pictures."""
    sample = overridden(p, "sample")
    if sample is not None:
        return sample(
            conditioning=p.c,
            unconditional_conditioning=p.uc,
            seeds=p.seeds,
            subseeds=p.subseeds,
            subseed_strength=p.subseed_strength,
            prompts=p.prompts,
        )
    if isinstance(p, StableDiffusionProcessingImg2Img):
        from modules.processing.img2img import sample_img2img  # imports torch

        return sample_img2img(p, p.c, p.uc)
    from modules.processing.txt2img import sample_txt2img  # imports torch

    assert isinstance(p, StableDiffusionProcessingTxt2Img)  # another class has its own
    return sample_txt2img(p, p.c, p.uc)


def _set_batch(p: StableDiffusionProcessing) -> None:
    """Set prompts, seeds and noise of the current batch."""
    from modules.processing.conditions import rows_of
    from modules.processing.latents import latent_format_of
    from modules.samplers import noise as rng

    for name in ("prompts", "negative_prompts", "seeds", "subseeds"):
        setattr(p, name, rows_of(getattr(p, f"all_{name}"), p.iteration, p.batch_size))
    if isinstance(p, StableDiffusionProcessingTxt2Img) and p.enable_hr:
        from modules.processing.hires import prompts_of_batch

        prompts_of_batch(p)
    latent = latent_format_of(p.sd_model)
    p.rng = rng.ImageRNG(
        (latent.channels, p.height // latent.factor, p.width // latent.factor),
        p.seeds,
        subseeds=p.subseeds,
        subseed_strength=p.subseed_strength,
        seed_resize_from_h=p.seed_resize_from_h,
        seed_resize_from_w=p.seed_resize_from_w,
        source=p.options.randn_source,
        eta_noise_seed_delta=int(p.options.eta_noise_seed_delta),
    )


def write_params(context: JobContext, infotext: str) -> None:
    """Write params.txt, which the paste button reads when the prompt box is empty."""
    if context.config.flags.get("no_prompt_history"):
        return
    try:
        write_text_atomically(context.config.data_dir / "params.txt", infotext)
    except OSError as error:
        log.warning("params.txt could not be written (%s).", error)
