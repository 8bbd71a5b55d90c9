"""The samplers of the reference code, under the names that extensions import. All samplers here are of one kind; this class makes one of them."""

from __future__ import annotations

from typing import Any

from modules.samplers.registry import create_sampler


class VanillaStableDiffusionSampler:
    """`VanillaStableDiffusionSampler(constructor, sd_model)` is the sampler here of the constructor's name: DDIM, PLMS or UniPC.

    No sampler is an instance of this class, which is what extensions ask to tell the kinds apart.
    """

    def __new__(cls, constructor: Any, sd_model: Any) -> Any:
        """Raises UnknownSamplerError."""
        return create_sampler(str(getattr(constructor, "__name__", constructor)).removesuffix("Sampler"), sd_model)


samplers_data_compvis: list[Any] = []
