"""reference_only: the denoiser's self-attentions also attend to the unit's picture; no control model is needed. Must not know the page."""

from __future__ import annotations

from typing import Any

import torch

from modules_forge.reference import Reference, add_reference, find_reference_attention
from modules_forge.supported_preprocessor import Preprocessor, PreprocessorParameter


class PreprocessorReference(Preprocessor):
    """The hint is the picture itself, encoded again for each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.tags, self.sorting_priority = "reference_only", ["Reference"], 100
        self.slider_resolution = PreprocessorParameter(visible=False, label="Resolution", minimum=128, maximum=2048, value=512, step=8)
        self.slider_1 = PreprocessorParameter(label="Style Fidelity", value=0.5, minimum=0.0, maximum=1.0, step=0.01, visible=True)
        self.show_control_mode, self.do_not_need_model = False, True

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add the reference to the denoiser. `unit`: its weight, step range and style fidelity (threshold_a)."""
        unit, engine = kwargs.get("unit"), process.sd_model
        latent_BCHW = engine.encode_first_stage(cond * 2.0 - 1.0)
        seed = int((getattr(process, "seeds", None) or [0])[0])
        noise_BCHW = torch.randn(latent_BCHW[:1].shape, generator=torch.Generator().manual_seed(seed))
        fidelity = float(getattr(unit, "threshold_a", -1.0))
        to_sigma = engine.forge_objects.unet.model.predictor.percent_to_sigma
        reference = Reference(
            latent_BCHW, noise_BCHW.to(latent_BCHW), weight=float(getattr(unit, "weight", 1.0)),
            fidelity=self.slider_1.gradio_update_kwargs["value"] if fidelity < 0 else min(fidelity, 1.0),
            sigma_range=(to_sigma(float(getattr(unit, "guidance_end", 1.0))), to_sigma(float(getattr(unit, "guidance_start", 0.0)))),
        )  # fmt: skip
        engine.forge_objects.unet = add_reference(engine.forge_objects.unet, reference)
        return cond, mask

    def process_after_every_sampling(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Release what the last step stored."""
        hook = find_reference_attention(process.sd_model.forge_objects.unet.model_options)
        if hook is not None:
            hook.clear()
