"""The presets of the page's "UI" switch, and the values that each sets until somebody changes them in the settings. No gradio, no torch."""

from __future__ import annotations

from dataclasses import dataclass

ALL = "all"
"""The choice that sets nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """`side_px`: of img2img's pictures. `steps`: None leaves what the slider shows, as Forge does. `distilled`: the distilled CFG scale, None for
    models without it. `has_gpu_weights`: Forge has a setting for the part of the GPU that its weights may take."""

    name: str
    width_px: int
    height_px: int
    side_px: int
    cfg: float
    sampler: str
    scheduler: str
    steps: int | None = None
    distilled: float | None = None
    has_gpu_weights: bool = False


def _square(name: str, *, cfg: float, scheduler: str, steps: int, side_px: int = 1024) -> Preset:
    return Preset(name=name, width_px=side_px, height_px=side_px, side_px=side_px, cfg=cfg, sampler="Euler", scheduler=scheduler, steps=steps)


PRESETS = (
    Preset(name="sd", width_px=512, height_px=640, side_px=512, cfg=7.0, sampler="Euler a", scheduler="Automatic"),
    Preset(
        name="xl", width_px=896, height_px=1152, side_px=1024, cfg=5.0, sampler="DPM++ 2M SDE", scheduler="Karras", has_gpu_weights=True
    ),
    Preset(
        name="flux", width_px=896, height_px=1152, side_px=1024, cfg=1.0, sampler="Euler", scheduler="Simple", distilled=3.5, has_gpu_weights=True
    ),
    _square("klein", cfg=1.0, scheduler="Simple", steps=4),
    _square("zit", cfg=1.0, scheduler="Simple", steps=9),
    _square("chroma", cfg=3.5, scheduler="Beta", steps=26),
    _square("sd3", cfg=4.5, scheduler="SGM Uniform", steps=20),
    _square("lumina", cfg=4.0, scheduler="Simple", steps=30),
    _square("qwen", cfg=4.0, scheduler="Simple", steps=50, side_px=1328),
    _square("krea", cfg=1.0, scheduler="Simple", steps=8),
    _square("anima", cfg=4.0, scheduler="Simple", steps=30),
)  # fmt: skip
NAMES = tuple(preset.name for preset in PRESETS)
