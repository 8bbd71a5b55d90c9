"""Control model classes for pictures as prompts in Flux.1: XLabs' IP-Adapter and Redux. Must not know the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.controlnet_loader import TensorsInMemory
from backend.flux_ip_adapter import apply_flux_ip_adapter, find_flux_ip_adapter, read_flux_ip_adapter, refuse_instantx
from backend.ip_adapter import IPAdapter
from backend.patcher.controlnet import ControlNetError
from backend.redux import Redux, apply_redux, is_redux, read_redux
from backend.siglip_vision import SiglipVision, is_siglip_vision, load_siglip_vision, siglip_width
from modules_forge import shared
from modules_forge.picture_towers import KeptTower, WidthReader, tower_files
from modules_forge.supported_controlnet import ControlModelPatcher
from modules_forge.supported_ip_adapter import find_tower

_SIGLIP: KeptTower[SiglipVision] = KeptTower()


def _read_siglip_width(file: TensorFile) -> int | None:
    return siglip_width(file) if is_siglip_vision(file.infos) else None


_widths = WidthReader(_read_siglip_width)


class FluxIPAdapterPatcher(ControlModelPatcher):
    """An IP-Adapter for Flux.1 by XLabs."""

    model_patcher: IPAdapter

    @staticmethod
    def try_build_from_state_dict(state_dict: Mapping[str, Tensor], ckpt_path: str) -> FluxIPAdapterPatcher | None:
        """Raises: CheckpointError for an adapter that is damaged, or InstantX's."""
        file = TensorsInMemory(Path(ckpt_path), state_dict)
        refuse_instantx(file)
        return None if find_flux_ip_adapter(state_dict) is None else FluxIPAdapterPatcher(read_flux_ip_adapter(file))

    def process_after_running_preprocessors(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Encode the unit's pictures once per job. Raises: ControlNetError if the image encoder is missing."""
        tower, pictures = find_tower(self.model_patcher), [hint.picture for hint in params.hints]
        params.features = tower.encode_images([np.zeros_like(pictures[0]), *pictures], hidden_states=False)[1:]

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> None:
        """Attach the picture to the pass. Raises: ControlNetError for an adapter of another family."""
        objects, masked = process.sd_model.forge_objects, self.advanced_mask_weighting if mask is None else mask
        objects.unet = apply_flux_ip_adapter(
            objects.unet,
            self.model_patcher,
            kwargs["params"].features,
            weight=self.strength,
            percent_range=(self.start_percent, self.end_percent),
            mask_B1HW=masked,
        )


class ReduxPatcher(ControlModelPatcher):
    """Redux for Flux.1."""

    model_patcher: Redux

    @staticmethod
    def try_build_from_state_dict(state_dict: Mapping[str, Tensor], ckpt_path: str) -> ReduxPatcher | None:
        """Raises: CheckpointError for a damaged file."""
        return ReduxPatcher(read_redux(TensorsInMemory(Path(ckpt_path), state_dict))) if is_redux(state_dict) else None

    def process_after_running_preprocessors(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Turn the unit's pictures into tokens once per job. Raises: ControlNetError if the image encoder is missing."""
        features = find_siglip(self.model_patcher).encode_images([hint.picture for hint in params.hints])
        params.features = self.model_patcher.make_tokens(features)

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> None:
        """Append the picture to the pass's text. Raises: ControlNetError for a checkpoint of another family."""
        objects = process.sd_model.forge_objects
        tokens: torch.Tensor = kwargs["params"].features
        percent_range = (self.start_percent, self.end_percent)
        objects.unet = apply_redux(objects.unet, self.model_patcher, tokens, weight=self.strength, percent_range=percent_range)


def find_siglip(redux: Redux) -> SiglipVision:
    """The image encoder for Redux; the last one stays in memory. Raises: ControlNetError if it is missing or damaged."""
    for path in tower_files():
        if _widths.of(path) == redux.feature_width:
            try:
                return _SIGLIP.get(path, load_siglip_vision)
            except CheckpointError as error:
                raise ControlNetError(str(error)) from error
    raise ControlNetError(
        f"{redux.name} needs the image encoder SigLIP (width {redux.feature_width}), but there is none. Put sigclip_vision_patch14_384.safetensors "
        f"(0.86 GB), or the file of another such encoder, into {shared.preprocessor_dir}."
    )
