"""Previews of the running job, made from the latents of a step.

"Full" decodes with the VAE, on the job's thread. All other methods use a linear map from latent channels to colors, fitted once to the current VAE,
so it works for any model; a thread of its own computes it, and the next step does not wait. Must not know jobs or the page.

Shapes: B pictures, C latent channels, H W latent rows and columns, N samples.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from backend import memory_management
from modules.pictures.grids import choose_num_rows, lay_grid
from modules.processing.latents import pixels_to_pil

if TYPE_CHECKING:
    from modules.jobs.state import State

log = logging.getLogger(__name__)

FULL = "Full"
_LINEAR_ALIASES = ("Approx NN", "TAESD")
_FIT_SIDE, _FIT_PICTURES, _FIT_SEED = 16, 2, 20

_fitted: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
_said: set[str] = set()


class PreviewMaker:
    """Turns latents BCHW into one picture. `due()` limits its cost as set in the settings.

    `shows_parts`: the settings want previews at the end of batches and passes instead of steps.
    """

    def __init__(self, engine: Any, options: Mapping[str, Any], now: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._method = _resolve_method(str(options["show_progress_type"]))
        self._enabled = bool(options["live_previews_enable"])
        self._every_num_steps = int(options["show_progress_every_n_steps"])
        self.shows_parts = self._every_num_steps < 0
        self._period_s = float(options["live_preview_refresh_period"]) / 1000
        self._whole_batch = bool(options["show_progress_grid"])
        self._now = now
        self._last_s = -1e9
        self._last_step = 0

    def due(self, step: int) -> bool:
        """Whether to make a preview after `step` steps: enough steps and enough time since the last one."""
        if not self._enabled or self._every_num_steps < 0:
            return False
        if step < self._last_step:  # another pass started
            self._last_step = 0
        if step - self._last_step < max(self._every_num_steps, 1) or self._now() - self._last_s < self._period_s:
            return False
        self._last_step, self._last_s = step, self._now()
        return True

    def __call__(self, latents_BCHW: Tensor) -> Image.Image | None:
        """One picture, or a grid of the batch. None if previews are off or memory does not allow one; the job continues without."""
        if not self._enabled:
            return None
        try:
            return self._make(latents_BCHW)
        except RuntimeError as error:
            if not memory_management.is_out_of_memory(error):
                raise
            log.info("No preview at this step: not enough memory (%s).", str(error).splitlines()[0])
            return None

    @property
    def is_light(self) -> bool:
        """Whether a picture takes no VAE, so that any thread may make it."""
        return self._method != FULL and _has_projection(self._engine)

    def _make(self, latents_BCHW: Tensor) -> Image.Image:
        chosen = latents_BCHW if self._whole_batch else latents_BCHW[:1]
        pictures = [pixels_to_pil(self._pixels(latent_CHW)) for latent_CHW in chosen]
        if len(pictures) == 1:
            return pictures[0]
        num_rows = choose_num_rows(len(pictures), wanted_rows=-1, batch_size=len(pictures), prevent_empty_spots=False)
        return lay_grid(pictures, num_rows, -(-len(pictures) // num_rows), "#ffffff")

    def _pixels(self, latent_CHW: Tensor) -> Tensor:
        """0..1 CHW."""
        if self._method == FULL:
            return self._engine.decode_first_stage(latent_CHW[None])[0].add(1).div(2)
        return approximate_colors(self._engine, latent_CHW)


class PreviewThread:
    """Makes light previews beside the job. Left out while an earlier one is being made."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._latest: Future[None] | None = None

    def show(self, state: State, maker: PreviewMaker) -> None:
        """Show the state's current latents soon. Called on the job's thread; heavy previews are made there, at once."""
        if not maker.is_light:
            state.do_set_current_image()
            return
        if self._latest is not None and not self._latest.done():
            return
        self._pool = self._pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix="preview")
        self._latest = self._pool.submit(_show, state, maker, state.current_latent, state.id_live_preview, state.sampling_step)

    def wait(self) -> None:
        """Wait for the preview that is being made."""
        if self._latest is not None:
            self._latest.result()


preview_thread = PreviewThread()


@torch.inference_mode()
def _show(state: State, maker: PreviewMaker, latents_BCHW: Tensor, preview_id: int, step: int) -> None:
    try:
        image = maker(latents_BCHW)
    except RuntimeError as error:  # the job must not end for a preview; a lost device stops the job itself
        log.warning("No preview at step %d: %s", step, error)
        return
    if image is not None:
        state.assign_preview(image, maker=maker, preview_id=preview_id, step=step)


def _resolve_method(name: str) -> str:
    if name in _LINEAR_ALIASES and name not in _said:
        _said.add(name)
        log.info("show_progress_type: %r previews need a network that is not available; the cheap approximation is used.", name)
    return FULL if name == FULL else "Approx cheap"


def approximate_colors(engine: Any, latent_CHW: Tensor) -> Tensor:
    """Colors 0..1 (3, H, W) in the size of the VAE's latents, without the VAE."""
    format_ = getattr(engine, "latent_format", None)
    return apply_projection(latent_CHW if format_ is None else format_.unfolded(latent_CHW), latent_projection(engine))


def apply_projection(latent_CHW: Tensor, projection: Tensor) -> Tensor:
    """Colors CHW of latents under a projection (C + 1, 3); its last row is the constant."""
    flat_HWC = latent_CHW.float().cpu().movedim(0, -1)
    return (flat_HWC @ projection[:-1] + projection[-1]).movedim(-1, 0).clamp(0, 1)


def _has_projection(engine: Any) -> bool:
    return getattr(getattr(engine, "latent_format", None), "preview", None) is not None or engine.forge_objects.vae.first_stage_model in _fitted


def latent_projection(engine: Any) -> Tensor:
    """(C + 1, 3): the best linear map from channels of the VAE's latents to colors: the family's table, else fitted once per VAE."""
    format_ = getattr(engine, "latent_format", None)
    if format_ is not None and format_.preview is not None:
        return torch.tensor(format_.preview)
    network = engine.forge_objects.vae.first_stage_model
    if network not in _fitted:
        fold = (lambda z_BCHW: z_BCHW) if format_ is None else format_.folded
        _fitted[network] = fit_projection(lambda z_BCHW: engine.decode_first_stage(fold(z_BCHW)), int(engine.forge_objects.vae.latent_channels))
    return _fitted[network]


def fit_projection(decode: Callable[[Tensor], Tensor], num_channels: int) -> Tensor:
    """Least squares between smooth random latents and their decoded pictures (-1..1), averaged over each latent's pixels."""
    generator = torch.Generator().manual_seed(_FIT_SEED)
    coarse = torch.randn(_FIT_PICTURES, num_channels, _FIT_SIDE // 4, _FIT_SIDE // 4, generator=generator)
    latents_BCHW = functional.interpolate(coarse, size=(_FIT_SIDE, _FIT_SIDE), mode="bicubic")
    pixels_BCHW = decode(latents_BCHW).float().cpu().add(1).div(2)
    colors_BCHW = functional.adaptive_avg_pool2d(pixels_BCHW, (_FIT_SIDE, _FIT_SIDE))
    inputs_NC = latents_BCHW.movedim(1, -1).reshape(-1, num_channels)
    inputs_NC = torch.cat([inputs_NC, torch.ones(len(inputs_NC), 1)], dim=1)
    return torch.linalg.lstsq(inputs_NC, colors_BCHW.movedim(1, -1).reshape(-1, 3)).solution
