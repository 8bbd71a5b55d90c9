"""What extensions that patch the UNet have in common: which models they can patch, and in which steps a patch acts.

Uses only the patch surface. Must not know the page or any particular extension.
"""

from __future__ import annotations

from typing import Any


def has_unet(p: Any, title: str) -> bool:
    """Whether the model has a UNet with Forge's blocks. If not, the job says that the extension `title` has no effect."""
    config = getattr(p.sd_model.forge_objects.unet.model.diffusion_model, "config", None)
    found = (config or {}).get("model_channels") is not None
    if not found:
        p.comment(f"{title} works inside the UNet of SD 1.x, SD 2.x and SDXL. This model has none, so it has no effect.")
    return found


class StepWindow:
    """Whether the current step lies between two fractions of all steps: the first step is 0, the last 1.

    `watch` makes a patcher report its steps. A window over all steps needs no report, so that pictures of a batch may still run on their own.
    """

    def __init__(self, p: Any, start: float, end: float) -> None:
        self._p, self._start, self._end = p, start, end
        self.is_open = True

    @property
    def is_whole(self) -> bool:
        return self._start <= 0.0 and self._end >= 1.0

    def watch(self, unet: Any) -> None:
        """Ask `unet` to report every step."""
        if not self.is_whole:
            unet.add_conditioning_modifier(self._note_step)

    def _note_step(self, *arguments: Any) -> tuple[Any, ...]:
        denoiser = self._p.sampler.model_wrap_cfg
        progress = denoiser.step / max(1, denoiser.total_steps - 1)
        self.is_open = self._start <= progress <= self._end
        return arguments
