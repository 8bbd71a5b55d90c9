"""Lanes: each picture of a batch gets its own sampler loop, so that a network split over several slots can keep every slot busy.

A picture's arithmetic is the same as in a batch; only the waiting changes. Must not know plans or devices.

Shapes: B pictures, C channels, H W latent rows and columns.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from backend.parallel.running.executor import Cancelled
from backend.sampling.sampler_types import StepInfo
from modules.prompts.schedules import MulticondLearnedConditioning
from modules.samplers.cfg_denoiser import CFGDenoiser
from modules.samplers.common import InterruptedException
from modules.scripts import callbacks

WHOLE_BATCH_OPTIONS = (
    "conditioning_modifiers",
    "model_function_wrapper",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "sampler_pre_cfg_function",
)
"""Patcher hooks that see all pictures of a step at once."""
BATCH_STEPPED = ("dpm_adaptive",)
"""Samplers whose steps depend on all pictures of the batch."""


def may_use_lanes(sampler: Any, p: Any, num_pictures: int) -> bool:
    """Whether each picture may run in its own lane: nothing needs to see the whole batch, and nothing changes for all pictures mid-pass."""
    unet = sampler.unet
    watched = any(unet.model_options.get(name) for name in WHOLE_BATCH_OPTIONS) or unet.controlnet_linked_list is not None
    listened = callbacks.is_listened_to("cfg_denoiser", "cfg_denoised", "cfg_after_cfg")
    scripted = listened or (getattr(p, "mask", None) is not None and _scripts_see_whole_batches(p))
    changes = getattr(p, "refiner", None) is not None or sampler.stop_at is not None
    return num_pictures > 1 and not (watched or scripted or changes) and sampler.funcname not in BATCH_STEPPED and hasattr(p.rng, "of_image")


def _scripts_see_whole_batches(p: Any) -> bool:
    """Whether a script blends masks itself; assumed true for a host that does not say."""
    scripts = getattr(p, "scripts", None)
    return scripts is not None and bool(getattr(scripts, "sees_whole_batches", lambda: True)())


def run_in_lanes(
    sampler: Any,
    start_BCHW: Tensor,
    run: Callable[[CFGDenoiser, Tensor, Any, Callable[[StepInfo], None]], Tensor],
    after_step: Callable[[StepInfo], None],
) -> Tensor:
    """`run(denoiser, x_1CHW, noise, on_step)` for every picture, each on its own thread; returns all latents.

    `after_step` is called for the whole batch once its last picture has completed the step. Interrupting one lane stops all.
    Raises: InterruptedException; whatever a lane raises.
    """
    progress = _Progress(start_BCHW, after_step)
    lanes = [_make_lane(sampler, picture, start_BCHW.shape[0], progress) for picture in range(start_BCHW.shape[0])]

    def run_lane(picture: int) -> Tensor:
        with torch.no_grad():
            try:
                return run(lanes[picture], start_BCHW[picture : picture + 1], sampler.p.rng.of_image(picture), progress.of(picture))
            except BaseException:
                progress.stop()
                raise

    with ThreadPoolExecutor(max_workers=len(lanes), thread_name_prefix="lane") as pool:
        done = [pool.submit(contextvars.copy_context().run, run_lane, picture) for picture in range(len(lanes))]
    failures = [failure for failure in (future.exception() for future in done) if failure is not None]
    if failures:
        raise min(failures, key=lambda failure: isinstance(failure, (InterruptedException, Cancelled)))
    return torch.cat([future.result() for future in done])


class _Progress:
    """Progress of each lane. The batch has completed a step when its last picture has."""

    def __init__(self, start_BCHW: Tensor, after_step: Callable[[StepInfo], None]) -> None:
        self._steps = [0] * start_BCHW.shape[0]
        self._inputs, self._latest = list(start_BCHW.split(1)), list(start_BCHW.split(1))
        self._tell = after_step
        self._told = 0
        self._lock = threading.Lock()
        self.is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True

    def of(self, picture: int) -> Callable[[StepInfo], None]:
        def after_step(info: StepInfo) -> None:
            with self._lock:
                self._steps[picture], self._inputs[picture], self._latest[picture] = info.index + 1, info.x, info.denoised
                if min(self._steps) > self._told:
                    self._told = min(self._steps)
                    self._tell(StepInfo(index=self._told - 1, sigma=info.sigma, x=torch.cat(self._inputs), denoised=torch.cat(self._latest)))

        return after_step


class LaneDenoiser(CFGDenoiser):
    """The denoiser of one picture of a batch."""

    def __init__(self, sampler: Any, progress: _Progress) -> None:
        super().__init__(sampler)
        self._progress = progress

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._progress.is_stopped:
            raise InterruptedException
        return super().forward(*args, **kwargs)


def _make_lane(sampler: Any, picture: int, num_pictures: int, progress: _Progress) -> LaneDenoiser:
    """The batch's denoiser, narrowed to one of its pictures."""
    batch, lane = sampler.model_wrap_cfg, LaneDenoiser(sampler, progress)
    lane.p, lane.steps, lane.total_steps, lane.image_cfg_scale = batch.p, batch.steps, batch.total_steps, batch.image_cfg_scale
    for name in ("mask", "nmask", "init_latent"):
        setattr(lane, name, _row(getattr(batch, name), picture, num_pictures))
    arguments = dict(sampler.sampler_extra_args)
    arguments["cond"] = MulticondLearnedConditioning((1,), [arguments["cond"].batch[picture]])
    arguments["uncond"] = None if arguments["uncond"] is None else [arguments["uncond"][picture]]
    arguments["image_cond"] = _row(arguments["image_cond"], picture, num_pictures)
    lane.own_arguments, lane.picture = arguments, picture
    return lane


def _row(tensor: Tensor | None, picture: int, num_pictures: int) -> Tensor | None:
    """A picture's row of a tensor with one row per picture; a tensor shared by all is returned unchanged."""
    return tensor if tensor is None or tensor.dim() == 0 or tensor.shape[0] != num_pictures else tensor[picture : picture + 1]
