"""Base class of preprocessors that extensions derive from and register.

A preprocessor turns a picture into a hint, and may act on the rest of the job. Must not know the page or any particular extension.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backend import memory_management
from modules_forge import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from backend.clip_vision import ClipVision, ClipVisionOutput
    from backend.patcher.base import ModelPatcher


class PreprocessorParameter:
    """A slider of a preprocessor. `gradio_update_kwargs` are the updates for the page's slider."""

    def __init__(
        self,
        minimum: float = 0.0,
        maximum: float = 1.0,
        step: float = 0.01,
        label: str = "Parameter 1",
        value: float = 0.5,
        visible: bool = False,
        **kwargs: Any,
    ) -> None:
        self.gradio_update_kwargs: dict[str, Any] = {
            "minimum": minimum, "maximum": maximum, "step": step, "label": label, "value": value, "visible": visible, **kwargs,
        }  # fmt: skip

    @property
    def api_json(self) -> dict[str, Any]:
        """The slider as reported by /controlnet/module_list."""
        names = {"label": "name", "value": "value", "minimum": "min", "maximum": "max", "step": "step"}
        return {theirs: self.gradio_update_kwargs[ours] for ours, theirs in names.items()}


class Preprocessor:
    """Derive from it, set `name` and `tags`, define `__call__`, and register one instance with add_supported_preprocessor."""

    def __init__(self) -> None:
        self.name = "PreprocessorBase"
        self.tags: Sequence[str] = []
        self.model_filename_filters: Sequence[str] = []
        self.slider_resolution = PreprocessorParameter(label="Resolution", minimum=128, maximum=2048, value=512, step=8, visible=True)
        self.slider_1 = PreprocessorParameter()
        self.slider_2 = PreprocessorParameter()
        self.slider_3 = PreprocessorParameter()
        self.model_patcher: ModelPatcher | None = None
        self.show_control_mode = True
        self.do_not_need_model = False
        self.sorting_priority = 0
        self.corp_image_with_a1111_mask_when_in_img2img_inpaint_tab = True
        self.fill_mask_with_one_when_resize_and_fill = False
        self.use_soft_projection_in_hr_fix = False
        self.expand_mask_when_resize_and_fill = False

    def setup_model_patcher(
        self,
        model: torch.nn.Module,
        load_device: torch.device | None = None,
        offload_device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ModelPatcher:
        """Pass the preprocessor's own network to memory management."""
        from backend.patcher.base import ModelPatcher  # imports torch's networks

        model.to(dtype)
        self.model_patcher = ModelPatcher(
            model, load_device=load_device or memory_management.get_torch_device(), offload_device=offload_device or torch.device("cpu")
        )
        return self.model_patcher

    def move_all_model_patchers_to_gpu(self) -> None:
        """Load the preprocessor's network onto its device."""
        memory_management.load_models_gpu([] if self.model_patcher is None else [self.model_patcher])

    def send_tensor_to_model_device(self, x: torch.Tensor) -> torch.Tensor:
        """`x` on the device and in the dtype of the preprocessor's network."""
        patcher = self.model_patcher
        return x if patcher is None else x.to(patcher.load_device, patcher.model_dtype())

    def process_after_running_preprocessors(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Called once per job, after all hints are computed."""
        return

    def process_before_every_sampling(self, process: Any, cond: Any, mask: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called before each pass. Returns the hint (1, 3, height, width), 0..1, and the mask or None, for the ControlNet."""
        return cond, mask

    def process_after_every_sampling(self, process: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        """Called after each pass, with the pictures of the batch."""
        return

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
        """The hint of a picture (H, W, 3), uint8."""
        return input_image


class PreprocessorClipVision(Preprocessor):
    """Encodes a picture with the CLIP picture tower in `filename` of the preprocessors' folder. `url` is where to get it; nothing is fetched."""

    global_cache: dict[str, ClipVision] = {}
    """Path -> tower, for all preprocessors."""

    def __init__(self, name: str, url: str, filename: str) -> None:
        super().__init__()
        self.name, self.url, self.filename = name, url, filename
        self.slider_resolution = PreprocessorParameter(visible=False)
        self.corp_image_with_a1111_mask_when_in_img2img_inpaint_tab = False
        self.show_control_mode = False
        self.sorting_priority = 1
        self.clipvision: ClipVision | None = None

    def load_clipvision(self) -> ClipVision:
        """The tower, read once. Raises: FileNotFoundError that says what to do; CheckpointError for another kind of file."""
        from backend.clip_vision import load_clip_vision  # imports transformers

        path = Path(shared.preprocessor_dir) / self.filename
        if not path.is_file():
            raise FileNotFoundError(f"{self.name} needs {path}, which is not there. Download it from {self.url} and put it there.")
        key = str(path)
        if key not in self.global_cache:
            self.global_cache[key] = load_clip_vision(path)
        self.clipvision = self.global_cache[key]
        return self.clipvision

    def __call__(
        self,
        input_image: Any,
        resolution: int,
        slider_1: float | None = None,
        slider_2: float | None = None,
        slider_3: float | None = None,
        input_mask: Any = None,
        **kwargs: Any,
    ) -> ClipVisionOutput:
        """The encoding of a picture (H, W, 3), uint8."""
        return self.load_clipvision().encode_image(torch.from_numpy(input_image[None].copy()) / 255.0)
