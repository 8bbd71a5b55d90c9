"""Redux for Flux.1: a picture as tokens behind the text's. The layers that make them from SigLIP's tokens, and the hook that appends them.

Must not know pages, units or folders. Shapes: N pictures, B rows, L SigLIP's tokens, T text tokens, D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import Tensor

from backend import memory_management
from backend.checkpoint_file import CheckpointError, TensorFile
from backend.control_dtype import TRANSFORMER_DTYPES, pick_dtype
from backend.modules.k_prediction import NEARLY_PURE_NOISE_SIGMA
from backend.patcher.base import ModelPatcher
from backend.patcher.controlnet import ControlNetError
from backend.patcher.unet import UnetPatcher
from backend.state_dict import assign_tensors, build_empty, check_plan, plan_as_named
from backend.tensor_file import refusing_odd_shapes

logger = logging.getLogger(__name__)

_MARKS = ("redux_up.weight", "redux_down.weight")
_WIDENING = 3
"""Redux's inner width, in text widths."""


def is_redux(keys: Collection[str]) -> bool:
    """Whether these are tensor names of Redux."""
    return all(mark in keys for mark in _MARKS)


class Redux:
    """Redux's layers with their patcher for memory management. `feature_width`: SigLIP's; `text_width`: of the tokens it makes."""

    def __init__(self, model: ReduxImageEncoder, name: str) -> None:
        self.name, self.feature_width, self.text_width = name, int(model.config.redux_dim), int(model.config.txt_in_features)
        self.patcher = ModelPatcher(
            model, load_device=memory_management.get_torch_device(), offload_device=torch.device("cpu"), current_device=torch.device("cpu")
        )

    @torch.inference_mode()
    def make_tokens(self, features_NLD: Tensor) -> Tensor:
        """Text tokens (N, L, D) on the host, of SigLIP's tokens."""
        memory_management.load_models_gpu([self.patcher])
        model: Any = self.patcher.model
        dtype = next(model.parameters()).dtype
        return model(features_NLD.to(self.patcher.load_device, dtype)).image_embeds.to("cpu", torch.float32)  # type: ignore[no-any-return]


def read_redux(file: TensorFile) -> Redux:
    """The Redux in a file. Raises: CheckpointError if it is damaged."""
    up, down = (file.infos[mark].shape for mark in _MARKS)
    if len(up) != 2 or len(down) != 2 or not all((*up, *down)) or up[0] != _WIDENING * down[0]:
        raise CheckpointError(f"{file.path.name}: looks like Redux, but {_MARKS[0]} is {up} and {_MARKS[1]} {down}. Download the file again.")
    with refusing_odd_shapes(file):
        model = build_empty(lambda: ReduxImageEncoder(redux_dim=up[1], txt_in_features=down[0]))
        plan = plan_as_named(model, file, lambda key: key)
        check_plan(plan, file, "Redux")
    assign_tensors(model, plan, file, storage_dtype=pick_dtype(model, TRANSFORMER_DTYPES))
    logger.info("Loaded %s: Redux for text %d wide.", file.path.name, down[0])
    return Redux(model, file.path.name)


@dataclass(eq=False)
class PictureTokens:
    """A conditioning modifier that appends tokens (1 or B, L, D) to the positive text at noise levels in `sigma_range`."""

    tokens_NLD: Tensor
    sigma_range: tuple[float, float] = (0.0, float("inf"))

    def __call__(self, model: Any, x: Tensor, sigma: Tensor, uncond: Any, cond: Sequence[dict[str, Any]], *rest: Any) -> tuple[Any, ...]:
        end, start = self.sigma_range
        is_always_on = end <= 0.0 and start >= NEARLY_PURE_NOISE_SIGMA
        if is_always_on or end <= float(sigma[0]) <= start:
            cond = [self._append(compiled, x.shape[0]) for compiled in cond]
        return (model, x, sigma, uncond, cond, *rest)

    def _append(self, compiled: dict[str, Any], num_pictures: int) -> dict[str, Any]:
        if self.tokens_NLD.shape[0] not in (1, num_pictures):
            raise ControlNetError(f"Redux got {self.tokens_NLD.shape[0]} pictures for a batch of {num_pictures}. Give one, or one for each.")
        text_BTD: Tensor = compiled["cross_attn"]
        num_rows = max(text_BTD.shape[0], self.tokens_NLD.shape[0])
        parts = (text_BTD.expand(num_rows, -1, -1), self.tokens_NLD.to(text_BTD).expand(num_rows, -1, -1))
        joined = torch.cat(parts, dim=1)
        old = compiled["model_conds"]["c_crossattn"]
        return {**compiled, "cross_attn": joined, "model_conds": {**compiled["model_conds"], "c_crossattn": type(old)(joined)}}


def apply_redux(
    unet: UnetPatcher, redux: Redux, tokens_NLD: Tensor, *, weight: float = 1.0, percent_range: tuple[float, float] = (0.0, 1.0)
) -> UnetPatcher:
    """A clone of `unet` that also reads a picture's tokens, times `weight`. Raises: ControlNetError for another family or text width."""
    theirs: Any = getattr(unet.model.diffusion_model, "config", {})
    if "num_single_layers" not in theirs or "pooled_projection_dim" not in theirs:
        raise ControlNetError(f"{redux.name} is Redux for Flux.1, but the checkpoint in use is not. Choose one of the checkpoint's family.")
    if theirs["joint_attention_dim"] != redux.text_width:
        raise ControlNetError(
            f"{redux.name} does not fit the checkpoint in use: it makes text {redux.text_width} wide, and the checkpoint reads "
            f"{theirs['joint_attention_dim']}. Choose a Redux that was made for this model."
        )
    end, start = (unet.model.predictor.percent_to_sigma(percent) for percent in reversed(percent_range))
    patched = unet.clone()
    if weight != 0.0:
        patched.add_conditioning_modifier(PictureTokens(tokens_NLD * weight, (end, start)))
    return patched
