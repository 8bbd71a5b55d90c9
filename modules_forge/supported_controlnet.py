"""Base class of control models that extensions derive from and register, and the class for ControlNets.

Must not know the page or where files are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.checkpoint_file import CheckpointError
from backend.controlnet_loader import TensorsInMemory, build_control, reads_control
from backend.patcher.controlnet import ControlBase, apply_controlnet_advanced
from backend.patcher.controlnet_union import UnionControlNet
from backend.patcher.flux_controlnet import FluxControlNet
from backend.patcher.latent_controlnet import HintEncoder


class ControlModelPatcher:
    """A control model with one unit's settings. Derive from it and register the class with add_supported_control_model."""

    def __init__(self, model_patcher: Any = None) -> None:
        self.model_patcher = model_patcher
        self.strength = 1.0
        self.start_percent = 0.0
        self.end_percent = 1.0
        self.positive_advanced_weighting: Mapping[str, Sequence[float]] | None = None
        self.negative_advanced_weighting: Mapping[str, Sequence[float]] | None = None
        self.advanced_frame_weighting: Sequence[float] | None = None
        self.advanced_sigma_weighting: Callable[[Tensor], float] | None = None
        self.advanced_mask_weighting: Tensor | None = None

    @staticmethod
    def try_build_from_state_dict(state_dict: Mapping[str, Tensor], ckpt_path: str) -> ControlModelPatcher | None:
        """The model in a state dict; None if it is of another kind."""
        return None

    def process_after_running_preprocessors(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Called once per job, after all hints are computed."""
        return

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> None:
        """Called before each pass: patch process.sd_model.forge_objects."""
        return

    def process_after_every_sampling(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Called after each pass."""
        return


class ControlNetPatcher(ControlModelPatcher):
    """A ControlNet for SD 1.x, SD 2.x, SDXL (also a Control-LoRA or a Union), Flux.1, SD 3.x or Z-Image, or a T2I-Adapter."""

    model_patcher: ControlBase

    def __init__(self, model_patcher: ControlBase) -> None:
        super().__init__(model_patcher)
        self.union_control_type = 0

    @property
    def needs_control_type(self) -> bool:
        """Whether the network must be told the kind of its hint (`union_control_type`, see UNION_TYPES)."""
        return isinstance(self.model_patcher, UnionControlNet) or (
            isinstance(self.model_patcher, FluxControlNet) and self.model_patcher.num_types > 0
        )

    @staticmethod
    def try_build_from_state_dict(state_dict: Mapping[str, Tensor], ckpt_path: str) -> ControlNetPatcher | None:
        """Raises: CheckpointError for a damaged or unsupported ControlNet."""
        if not reads_control(state_dict):
            return None
        return ControlNetPatcher(build_control(TensorsInMemory(Path(ckpt_path), state_dict)))

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> None:
        """Put the ControlNet at the head of the pass's chain."""
        objects, link = process.sd_model.forge_objects, self.model_patcher
        if self.needs_control_type and isinstance(link, (UnionControlNet, FluxControlNet)):
            link = link.of_type(self.union_control_type)
        if isinstance(link, HintEncoder):
            link = link.with_encoder(partial(_encode, process.sd_model))
        objects.unet = apply_controlnet_advanced(
            unet=objects.unet,
            controlnet=link,
            image_bchw=cond,
            strength=self.strength,
            start_percent=self.start_percent,
            end_percent=self.end_percent,
            positive_advanced_weighting=self.positive_advanced_weighting,
            negative_advanced_weighting=self.negative_advanced_weighting,
            advanced_frame_weighting=self.advanced_frame_weighting,
            advanced_sigma_weighting=self.advanced_sigma_weighting,
            advanced_mask_weighting=self.advanced_mask_weighting if mask is None else mask,
        )


def _encode(model: Any, pixels: Tensor) -> Tensor:
    """Latents of pictures (I, 3, H, W) in 0..1, one at a time."""
    return torch.cat([model.encode_first_stage(picture[None] * 2 - 1) for picture in pixels])


__all__ = ["CheckpointError", "ControlModelPatcher", "ControlNetPatcher"]
