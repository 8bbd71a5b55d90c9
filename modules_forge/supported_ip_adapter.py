"""The control model class for IP-Adapters, and where to find their image encoders (CLIP vision models). Must not know the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from backend.checkpoint_file import CheckpointError, TensorFile
from backend.clip_vision import ClipVision, is_clip_vision, load_clip_vision, tower_widths
from backend.controlnet_loader import TensorsInMemory
from backend.ip_adapter import IPAdapter, apply_ip_adapter, is_ip_adapter, read_ip_adapter
from backend.patcher.controlnet import ControlNetError
from modules_forge import shared
from modules_forge.picture_towers import KeptTower, WidthReader, tower_files
from modules_forge.supported_controlnet import ControlModelPatcher

_TOWER: KeptTower[ClipVision] = KeptTower()


def _read_widths(file: TensorFile) -> tuple[int, int] | None:
    return tower_widths(file) if is_clip_vision(file.infos) else None


_widths = WidthReader(_read_widths)


class IPAdapterPatcher(ControlModelPatcher):
    """An IP-Adapter for SD 1.x or SDXL: plain, light, plus, plus-face or full-face."""

    model_patcher: IPAdapter

    @staticmethod
    def try_build_from_state_dict(state_dict: Mapping[str, Tensor], ckpt_path: str) -> IPAdapterPatcher | None:
        """Raises: CheckpointError for an adapter that is damaged or for faces."""
        if not is_ip_adapter(state_dict):
            return None
        return IPAdapterPatcher(read_ip_adapter(TensorsInMemory(Path(ckpt_path), state_dict)))

    def process_after_running_preprocessors(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Encode the unit's pictures once per job. Raises: ControlNetError if the image encoder is missing."""
        tower = find_tower(self.model_patcher)
        params.features = tower.encode_images([hint.picture for hint in params.hints], hidden_states=self.model_patcher.reads_hidden_states)

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> None:
        """Attach the picture to the pass. Raises: ControlNetError for an adapter of another family."""
        objects, masked = process.sd_model.forge_objects, self.advanced_mask_weighting if mask is None else mask
        objects.unet = apply_ip_adapter(
            objects.unet,
            self.model_patcher,
            kwargs["params"].features,
            weight=self.strength,
            percent_range=(self.start_percent, self.end_percent),
            mask_B1HW=masked,
        )


def find_tower(adapter: IPAdapter) -> ClipVision:
    """The image encoder for an adapter; the last one stays in memory. Raises: ControlNetError if it is missing or damaged."""
    place = 0 if adapter.reads_hidden_states else 1
    for path in tower_files():
        widths = _widths.of(path)
        if widths is not None and widths[place] == adapter.feature_width:
            try:
                return _TOWER.get(path, load_clip_vision)
            except CheckpointError as error:
                raise ControlNetError(str(error)) from error
    raise ControlNetError(
        f"{adapter.name} needs the image encoder {adapter.tower_name} ({('width', 'projection')[place]} {adapter.feature_width}), but there is none. "
        "Put its file (model.safetensors of the image_encoder folder that comes with the adapter, under any name) into "
        f"{shared.preprocessor_dir}."
    )
