"""Preprocessors that need no network, as objects that the ControlNet extension registers.

Must not know the page. image_maps.py does the pixel work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from modules_forge import image_maps
from modules_forge.reference_preprocessor import PreprocessorReference
from modules_forge.supported_preprocessor import Preprocessor, PreprocessorParameter
from modules_forge.utils import HWC3, resize_image_with_pad

_HIDDEN = PreprocessorParameter()
_MASKED = -1.0
"""The hint value that tells an inpaint ControlNet to fill in."""


def _slider(label: str, value: float, minimum: float, maximum: float, step: float) -> PreprocessorParameter:
    return PreprocessorParameter(label=label, value=value, minimum=minimum, maximum=maximum, step=step, visible=True)


class PixelPreprocessor(Preprocessor):
    """A pixel map at a given resolution of its shorter side. `make(picture, slider 1, slider 2)`."""

    def __init__(
        self,
        name: str,
        tags: Sequence[str],
        make: Callable[[Any, float, float], Any],
        *,
        filters: Sequence[str] = (),
        sliders: Sequence[PreprocessorParameter] = (),
        has_resolution: bool = True,
        priority: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.tags, self._make = name, list(tags), make
        self.model_filename_filters = list(filters) or [tag.lower() for tag in tags]
        self.sorting_priority = priority
        self.slider_1, self.slider_2, self.slider_3 = (*sliders, *[_HIDDEN] * 3)[:3]
        if not has_resolution:
            self.slider_resolution = PreprocessorParameter(visible=False, label="Resolution", minimum=128, maximum=2048, value=512, step=8)

    def __call__(
        self,
        input_image: Any,
        resolution: int,
        slider_1: float | None = None,
        slider_2: float | None = None,
        slider_3: float | None = None,
        input_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        values = [
            float(slider.gradio_update_kwargs["value"] if given is None else given)
            for slider, given in ((self.slider_1, slider_1), (self.slider_2, slider_2))
        ]
        picture = HWC3(np.asarray(input_image))
        if not self.slider_resolution.gradio_update_kwargs["visible"]:
            return self._make(picture, *values)
        padded, remove_pad = resize_image_with_pad(picture, int(resolution))
        return remove_pad(self._make(padded, *values))


class PreprocessorInpaint(Preprocessor):
    """inpaint_global_harmonious: the hint is -1 under the mask, so that the ControlNet fills it in; the whole picture is repainted."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "inpaint_global_harmonious"
        self.tags, self.model_filename_filters = ["Inpaint"], ["inpaint"]
        self.slider_resolution = PreprocessorParameter(visible=False, label="Resolution", minimum=128, maximum=2048, value=512, step=8)
        self.fill_mask_with_one_when_resize_and_fill = True
        self.expand_mask_when_resize_and_fill = True

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The hint with the mask cut out; the ControlNet itself acts everywhere."""
        if mask is None:
            return cond, None
        hole = mask.round()
        return cond * (1.0 - hole) + _MASKED * hole, None


class PreprocessorInpaintOnly(PreprocessorInpaint):
    """inpaint_only: like inpaint_global_harmonious, but the unmasked part stays unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "inpaint_only"
        self.sorting_priority = 100

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Like the base class; also, the denoised latents outside the mask are replaced by the picture's."""
        if mask is not None:
            self._keep_unmasked(process, cond, mask)
        return super().process_before_every_sampling(process, cond, mask, *args, **kwargs)

    def _keep_unmasked(self, process: Any, cond: torch.Tensor, mask: torch.Tensor) -> None:
        engine = process.sd_model
        latent_BCHW = engine.encode_first_stage(cond * 2.0 - 1.0)
        hole_B1HW = torch.nn.functional.interpolate(mask.float(), size=latent_BCHW.shape[-2:], mode="area").round()
        unet = engine.forge_objects.unet.clone()

        def keep(arguments: dict[str, Any]) -> torch.Tensor:
            denoised: torch.Tensor = arguments["denoised"]
            hole, latent = hole_B1HW.to(denoised), latent_BCHW.to(denoised)
            return denoised * hole + latent * (1.0 - hole)

        unet.set_model_sampler_post_cfg_function(keep)
        engine.forge_objects.unet = unet


class PicturePreprocessor(PixelPreprocessor):
    """For IP-Adapters and Redux: the unmodified picture. The adapter, which knows its image encoder, computes the features."""

    def __init__(self, name: str, filters: Sequence[str] = ("ip-adapter", "ip_adapter")) -> None:
        super().__init__(name, ("IP-Adapter",), lambda image, *_: image, filters=filters, has_resolution=False, priority=100)
        self.corp_image_with_a1111_mask_when_in_img2img_inpaint_tab = False
        self.show_control_mode = False


def builtin_preprocessors() -> list[Preprocessor]:
    """A new instance of each, in list order."""
    maps = image_maps
    gamma = _slider("Gamma Correction", 1.0, 0.1, 2.0, 0.001)
    return [
        PixelPreprocessor("None", (), lambda image, *_: image, has_resolution=False, priority=10),
        PixelPreprocessor(
            "canny", ("Canny",), maps.find_edges, priority=100,
            sliders=(_slider("Low Threshold", 100, 0, 256, 1), _slider("High Threshold", 200, 0, 256, 1)),
        ),
        PixelPreprocessor(
            "invert (from white bg & black line)", ("Canny", "Lineart", "Scribble", "Sketch", "MLSD"), lambda image, *_: maps.invert(image),
            priority=20,
        ),
        PixelPreprocessor(
            "threshold", (), lambda image, value, _: maps.threshold(image, value), sliders=(_slider("Binarization Threshold", 127, 0, 255, 1),)
        ),
        PixelPreprocessor(
            "blur_gaussian", ("Tile", "Blur"), lambda image, sigma, _: maps.blur(image, sigma), filters=("blur",),
            sliders=(_slider("Sigma", 9.0, 0.01, 64.0, 0.01),),
        ),
        PixelPreprocessor(
            "tile_resample", ("Tile",), lambda image, rate, _: maps.shrink(image, rate), has_resolution=False, priority=100,
            sliders=(_slider("Down Sampling Rate", 1.0, 1.0, 8.0, 0.01),),
        ),
        PixelPreprocessor(
            "scribble_xdog", ("Scribble", "Sketch"), lambda image, value, _: maps.find_scribble(image, value), priority=50,
            sliders=(_slider("XDoG Threshold", 32, 1, 64, 1),),
        ),
        PixelPreprocessor("shuffle", ("Shuffle",), lambda image, *_: maps.shuffle(image), priority=100),
        PixelPreprocessor(
            "lineart_standard (from white bg & black line)", ("Lineart",), lambda image, *_: maps.find_lines(image, 6.0, 8.0), priority=100
        ),
        PixelPreprocessor(
            "recolor_luminance", ("Recolor",), lambda image, power, _: maps.take_luminance(image, power), sliders=(gamma,), priority=100
        ),
        PixelPreprocessor("recolor_intensity", ("Recolor",), lambda image, power, _: maps.take_intensity(image, power), sliders=(gamma,)),
        PixelPreprocessor("t2ia_color_grid", ("T2I-Adapter",), lambda image, *_: maps.make_color_grid(image), filters=("t2i", "color")),
        *(PicturePreprocessor(f"{tower} (IPAdapter)") for tower in ("CLIP-ViT-H", "CLIP-ViT-bigG", "CLIP-ViT-L")),
        PicturePreprocessor("SigLIP (Redux)", ("redux",)),
        PreprocessorInpaintOnly(),
        PreprocessorInpaint(),
        PreprocessorReference(),
    ]  # fmt: skip
