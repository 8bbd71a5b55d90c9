"""The chain of ControlNets that gives a sampling run its residuals, each with hint, strength, range of steps and weights, under Forge's names.

A link is made for one job; copies share the network. Must not know prompts, files, preprocessors or pages.

Shapes: B rows (a row is one picture for one branch), C channels, H W rows and columns, I pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from backend import memory_management
from backend.nn.controlnet import HINT_STEP_PX, ControlNetwork
from backend.nn.deferred_control import Residuals, add_residuals
from backend.nn.t2i_adapter import AdapterNetwork, place_features
from backend.patcher.base import ModelPatcher
from backend.patcher.unet import UnetPatcher

if TYPE_CHECKING:
    from backend.modules.k_model import KModel

logger = logging.getLogger(__name__)

Weighting = Mapping[str, Sequence[float]]
"""A factor for each residual, per kind of segment."""

NUM_SOFT_WEIGHTS = 12
SOFT_STEP = 0.825
_HINT_PEAK_NUMBERS = 48
"""Live numbers per pixel while a hint is embedded: input, output and scratch memory of a 16-channel convolution at full size."""


class ControlNetError(ValueError):
    """A ControlNet cannot be used here. The message says which, why, and what to do."""


def soft_weights(*, is_sdxl: bool) -> dict[str, list[float]]:
    """The weights of the modes that favor the prompt or ControlNet: from 0.825 ** 12 at the outermost skip upward, so the outer levels follow the
    prompt.

    SDXL has nine skips, so its middle continues the series.
    """
    series = [SOFT_STEP ** (NUM_SOFT_WEIGHTS - index) for index in range(NUM_SOFT_WEIGHTS)]
    return {"input": series, "middle": [SOFT_STEP**3 if is_sdxl else 1.0], "output": list(series)}


def zero_weights() -> dict[str, list[float]]:
    """Weights that turn a branch off."""
    return {"input": [0.0] * NUM_SOFT_WEIGHTS, "middle": [0.0], "output": [0.0] * NUM_SOFT_WEIGHTS}


def apply_controlnet_advanced(
    unet: UnetPatcher,
    controlnet: ControlBase,
    image_bchw: Tensor,
    strength: float,
    start_percent: float,
    end_percent: float,
    positive_advanced_weighting: Weighting | None = None,
    negative_advanced_weighting: Weighting | None = None,
    advanced_frame_weighting: Sequence[float] | None = None,
    advanced_sigma_weighting: Callable[[Tensor], float] | None = None,
    advanced_mask_weighting: Tensor | None = None,
) -> UnetPatcher:
    """A clone of `unet` with one more link, which is active between two fractions of the timesteps (0..1).

    `image_bchw`: the hint in 0..1, one row for all pictures or one each. Weights: per residual for the positive and the negative branch, per
    picture, by noise level, and by position (a mask (I or 1, 1, H, W)). Raises: ControlNetError for a ControlNet of another family.
    """
    link = controlnet.copy_for(unet.model).set_cond_hint(image_bchw, strength, (start_percent, end_percent))
    link.positive_advanced_weighting = positive_advanced_weighting
    link.negative_advanced_weighting = negative_advanced_weighting
    link.advanced_frame_weighting = advanced_frame_weighting
    link.advanced_sigma_weighting = advanced_sigma_weighting
    link.advanced_mask_weighting = advanced_mask_weighting
    link.check_fits(unet.model)
    patched = unet.clone()
    patched.add_patched_controlnet(link)
    return patched


# weights


def compute_controlnet_weighting(control: Residuals, cnet: ControlBase) -> Residuals:
    """Multiply the residuals by all weights of a link, in place."""
    rows = find_row_weights(cnet)
    for kind, residuals in control.items():
        for index, residual in enumerate(residuals):
            if residual is not None:
                residuals[index] = weigh_residual(residual, cnet, kind, index, rows)
    return control


def find_row_weights(cnet: ControlBase) -> Tensor | float:
    """The product of frame and sigma weights: a number, or (B, 1, 1, 1)."""
    options = cnet.transformer_options
    weight: Tensor | float = 1.0
    if cnet.advanced_sigma_weighting is not None:
        weight = float(cnet.advanced_sigma_weighting(options["sigmas"]))
    if cnet.advanced_frame_weighting is not None:
        frames_I = torch.as_tensor(cnet.advanced_frame_weighting, dtype=torch.float32)
        branches = len(options["cond_or_uncond"])
        if frames_I.shape[0] * branches != options["cond_mark"].shape[0]:
            raise ControlNetError(
                f"A ControlNet has weights for {frames_I.shape[0]} pictures, but the batch has {options['cond_mark'].shape[0] // branches}. Give one "
                "weight per picture of the batch."
            )
        weight = frames_I.repeat(branches).view(-1, 1, 1, 1).to(options["cond_mark"].device) * weight
    return weight


def weigh_residual(residual_BCHW: Tensor, cnet: ControlBase, kind: str, index: int, rows: Tensor | float) -> Tensor:
    """One residual times the weights of a link. `rows` comes from `find_row_weights`."""
    mark_B: Tensor | None = cnet.transformer_options.get("cond_mark")
    weight: Tensor | float = rows
    if cnet.positive_advanced_weighting is not None or cnet.negative_advanced_weighting is not None:
        positive = _weight_of(cnet.positive_advanced_weighting, kind, index)
        negative = _weight_of(cnet.negative_advanced_weighting, kind, index)
        if mark_B is None:
            raise ControlNetError("A ControlNet weights the branches differently, but `cond_mark`, which says each row's branch, is missing. Set it.")
        weight = (positive * (1.0 - mark_B) + negative * mark_B).view(-1, 1, 1, 1) * weight
    if cnet.advanced_mask_weighting is not None and cnet.is_spatial(kind):
        mask_B1HW = interpolate(cnet.advanced_mask_weighting.to(residual_BCHW.device, torch.float32), size=residual_BCHW.shape[-2:], mode="bilinear")
        if mask_B1HW.shape[0] not in (1, residual_BCHW.shape[0]):
            mask_B1HW = mask_B1HW.repeat(residual_BCHW.shape[0] // mask_B1HW.shape[0], 1, 1, 1)
        weight = mask_B1HW * weight
    if isinstance(weight, float):
        return residual_BCHW if weight == 1.0 else residual_BCHW * weight
    return residual_BCHW * weight.to(residual_BCHW)


def _weight_of(weighting: Weighting | None, kind: str, index: int) -> float:
    if weighting is None:
        return 1.0
    weights = weighting.get(kind, ())
    if index >= len(weights):
        raise ControlNetError(f"A ControlNet has {len(weights)} weights for its {kind} residuals, but more residuals. Give one weight for each.")
    return weights[index]


# links

_SETTINGS = (
    "cond_hint_original", "strength", "timestep_percent_range", "name", "global_average_pooling", "positive_advanced_weighting",
    "negative_advanced_weighting", "advanced_frame_weighting", "advanced_sigma_weighting", "advanced_mask_weighting",
)  # fmt: skip
_WIDTHS = (("levels", "block_out_channels"), ("text features", "cross_attention_dim"), ("extra vectors", "projection_class_embeddings_input_dim"))


class ControlBase:
    """One link of the chain. `cond_hint_original` is the hint as given, `cond_hint` the hint in the size and on the device where it is used."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.cond_hint_original: Tensor | None = None
        self.cond_hint: Tensor | None = None
        self.strength = 1.0
        self.timestep_percent_range = (0.0, 1.0)
        self.timestep_range: tuple[float, float] | None = None
        self.device = device or memory_management.get_torch_device()
        self.previous_controlnet: ControlBase | None = None
        self.transformer_options: dict[str, Any] = {}
        self.name = "a ControlNet"
        self.global_average_pooling = False
        self.positive_advanced_weighting: Weighting | None = None
        self.negative_advanced_weighting: Weighting | None = None
        self.advanced_frame_weighting: Sequence[float] | None = None
        self.advanced_sigma_weighting: Callable[[Tensor], float] | None = None
        self.advanced_mask_weighting: Tensor | None = None

    # what a job sets

    def set_cond_hint(self, cond_hint: Tensor, strength: float = 1.0, timestep_percent_range: tuple[float, float] = (0.0, 1.0)) -> ControlBase:
        """Set the hint (I or 1, 3, height, width) in 0..1, its strength, and the fractions of the timesteps between which it is active."""
        self.cond_hint_original, self.cond_hint = cond_hint, None
        self.strength, self.timestep_percent_range = strength, timestep_percent_range
        return self

    def set_previous_controlnet(self, controlnet: ControlBase | None) -> ControlBase:
        """Set the link whose residuals are added to this one's."""
        self.previous_controlnet = controlnet
        return self

    def copy(self) -> ControlBase:
        """The same network with the same settings, in no chain."""
        raise NotImplementedError(f"{type(self).__name__} does not implement copy().")

    def copy_for(self, model: KModel) -> ControlBase:
        """A copy that returns residuals for this denoiser. Raises: ControlNetError if that is impossible."""
        return self.copy()

    def copy_to(self, other: ControlBase) -> None:
        """Copy this link's settings to another link of the same network."""
        for name in _SETTINGS:
            setattr(other, name, getattr(self, name))

    def check_fits(self, model: KModel) -> None:
        """Raises: ControlNetError if the network cannot return residuals for this denoiser."""
        return

    # what a run calls

    def pre_run(self, model: KModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Before the first step: compute the noise levels between which this link is active."""
        start, end = self.timestep_percent_range
        self.timestep_range = (percent_to_timestep_function(start), percent_to_timestep_function(end))

    def cleanup(self) -> None:
        """After the last step: drop what was kept for the run."""
        self.cond_hint, self.timestep_range, self.transformer_options = None, None, {}

    def get_models(self) -> list[ModelPatcher]:
        """Networks of the whole chain that must be on their devices while sampling, each once."""
        return [] if self.previous_controlnet is None else self.previous_controlnet.get_models()

    def inference_memory_requirements(self, dtype: torch.dtype | None) -> int:
        """Bytes the whole chain needs in addition to the denoiser's working memory."""
        return 0 if self.previous_controlnet is None else self.previous_controlnet.inference_memory_requirements(dtype)

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int) -> Residuals | None:
        """Residuals of the chain for noisy latents `x_noisy` (B, C, H, W) at noise levels `t` (B,); None if no link is active.

        `cond`: the network's arguments. `batched_number`: branches in the batch, each with one row per picture.
        """
        before = None if self.previous_controlnet is None else self.previous_controlnet.get_control(x_noisy, t, cond, batched_number)
        if not self.acts_at(float(t[0])):
            return before
        for modify in self.transformer_options.get("controlnet_conditioning_modifiers", ()):
            x_noisy, t, cond, batched_number = modify(self, x_noisy, t, cond, batched_number)
        return self.control_merge(self._find_residuals(x_noisy, t, cond, batched_number), before)

    def get_own_control(self, x_noisy: Tensor, t: Tensor, cond: dict[str, Any], batched_number: int) -> Residuals:
        """Like `get_control`, but only this link's residuals, at a noise level where it is active."""
        return self.control_merge(self._find_residuals(x_noisy, t, cond, batched_number), None)

    def acts_at(self, sigma: float) -> bool:
        """Whether residuals are added at this noise level."""
        return self.timestep_range is None or self.timestep_range[1] <= sigma <= self.timestep_range[0]

    def _find_residuals(self, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> Residuals:
        raise NotImplementedError(f"{type(self).__name__} does not implement _find_residuals().")

    def control_merge(self, own: Residuals, before: Residuals | None) -> Residuals:
        """This link's residuals times strength and weights, plus those of the links before."""
        for residuals in own.values():
            residuals[:] = [None if residual is None else self.scale(residual) for residual in residuals]
        return add_residuals(self.spread(compute_controlnet_weighting(own, self)), before or {})

    def spread(self, own: Residuals) -> Residuals:
        """This link's weighed residuals, one for each place where one is added."""
        return own

    def is_spatial(self, kind: str) -> bool:
        """Whether the residuals of this list have rows and columns of the picture, so that a mask applies to them."""
        return True

    def scale(self, residual_BCHW: Tensor) -> Tensor:
        """A residual times the strength, averaged over the picture if the network requires that."""
        if self.global_average_pooling:
            residual_BCHW = residual_BCHW.mean(dim=(2, 3), keepdim=True).expand(residual_BCHW.shape).contiguous()
        return residual_BCHW if self.strength == 1.0 else residual_BCHW * self.strength

    # hints

    def _fit_hint(self, x_BCHW: Tensor, batched_number: int, dtype: torch.dtype, channels: int = 3, step_px: int = HINT_STEP_PX) -> Tensor:
        """The hint in the latents' size, rounded up to a multiple of `step_px`, with one row for all pictures or one each, on this link's device."""
        height, width = (-(-side * HINT_STEP_PX // step_px) * step_px for side in x_BCHW.shape[-2:])
        if self.cond_hint is None or self.cond_hint.shape[-2:] != (height, width) or self.cond_hint.dtype != dtype:
            if self.cond_hint_original is None:
                raise ControlNetError(f"{self.name} was added to a run without a hint. Call set_cond_hint first.")
            hint = _with_channels(self.cond_hint_original, channels, self.name)
            self.cond_hint = crop_and_resize(hint, height, width).to(self.device, dtype)
            self._forget_embedding()
        pictures = x_BCHW.shape[0] // batched_number
        if self.cond_hint.shape[0] not in (1, pictures):
            raise ControlNetError(
                f"{self.name} got {self.cond_hint.shape[0]} hints for a batch of {pictures} pictures. Give one hint, or one per picture."
            )
        return self.cond_hint

    def _forget_embedding(self) -> None:
        return


def _layers(config: Any) -> list[int]:
    """Resnets of each level on the way in."""
    per_level, levels = config.layers_per_block, len(config.block_out_channels)
    return [per_level] * levels if isinstance(per_level, int) else list(per_level)


def _with_channels(hint: Tensor, channels: int, name: str) -> Tensor:
    if hint.shape[1] == channels:
        return hint
    if channels == 1:
        return hint.mean(dim=1, keepdim=True)
    if hint.shape[1] == 1:
        return hint.expand(-1, channels, -1, -1)
    raise ControlNetError(f"{name} got a hint with {hint.shape[1]} channels. Give one with {channels}.")


def crop_and_resize(hint_BCHW: Tensor, height: int, width: int) -> Tensor:
    """The hint's middle part with the target's proportions, resized to the nearest pixel."""
    old_height, old_width = hint_BCHW.shape[-2:]
    if (old_height, old_width) == (height, width):
        return hint_BCHW
    cut_width = max(1, min(old_width, round(old_height * width / height)))
    cut_height = max(1, min(old_height, round(old_width * height / width)))
    top, left = (old_height - cut_height) // 2, (old_width - cut_width) // 2
    cut = hint_BCHW[..., top : top + cut_height, left : left + cut_width]
    return interpolate(cut.float(), size=(height, width), mode="nearest-exact")


class ControlNet(ControlBase):
    """A ControlNet whose network is shared by all copies."""

    def __init__(
        self,
        control_model: ControlNetwork,
        global_average_pooling: bool = False,
        device: torch.device | None = None,
        load_device: torch.device | None = None,
        manual_cast_dtype: torch.dtype | None = None,
        *,
        patcher: ModelPatcher | None = None,
    ) -> None:
        self.control_model_wrapped = patcher or ModelPatcher(
            control_model,
            load_device=load_device or device or memory_management.get_torch_device(),
            offload_device=memory_management.unet_offload_device(),
            current_device=next(control_model.parameters()).device,
        )
        super().__init__(self.control_model_wrapped.load_device)
        self.control_model = control_model
        self.load_device = self.control_model_wrapped.load_device
        self.manual_cast_dtype = manual_cast_dtype
        self.global_average_pooling = global_average_pooling
        self._predictor: Any = None
        self._embeddings: dict[torch.device, Tensor] = {}

    def copy(self) -> ControlNet:
        """The same network with the same settings, in no chain."""
        other = type(self)(self.control_model, manual_cast_dtype=self.manual_cast_dtype, patcher=self.control_model_wrapped)
        self.copy_to(other)
        return other

    def check_fits(self, model: KModel) -> None:
        """Raises: ControlNetError if widths or the extra vector differ from the denoiser's."""
        own: Any = self.control_model.config
        theirs: Any = getattr(model.diffusion_model, "config", {})
        if "block_out_channels" not in theirs:
            raise ControlNetError(
                f"{self.name} is a ControlNet for {family_of(own)}, but the checkpoint in use is no UNet. Choose one of the checkpoint's family."
            )
        has_attention = "Cross" in "".join(own.down_block_types) or "Cross" in (own.mid_block_type or "")
        for what, name in _WIDTHS:
            is_read = name != "cross_attention_dim" or has_attention
            if is_read and _plain(own[name]) != _plain(theirs[name]):
                raise ControlNetError(
                    f"{self.name} does not fit the checkpoint in use: {what} are {own[name]} wide, the checkpoint's {theirs[name]}. It is for "
                    f"{family_of(own)} but the checkpoint is {family_of(theirs)}. Choose a ControlNet of the checkpoint's family."
                )
        if _layers(own) != _layers(theirs) or theirs.mid_block_type is None:
            raise ControlNetError(
                f"{self.name} does not fit the checkpoint in use: it has {_layers(own)} layers per level, and the checkpoint {_layers(theirs)}"
                f"{' and no middle' if theirs.mid_block_type is None else ''}. A distilled checkpoint takes no ControlNet of the whole one; "
                "choose the checkpoint that it was distilled from."
            )

    def pre_run(self, model: KModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Before the first step: compute noise levels, and set the predictor that scales latents. Raises: ControlNetError."""
        super().pre_run(model, percent_to_timestep_function)
        self.check_fits(model)
        self._predictor = model.predictor

    def cleanup(self) -> None:
        """After the last step: drop what was kept for the run."""
        super().cleanup()
        self._predictor = None
        self._forget_embedding()

    def get_models(self) -> list[ModelPatcher]:
        """Networks of the whole chain, each once."""
        found = super().get_models()
        return found if any(self.control_model_wrapped.is_clone(one) for one in found) else [*found, self.control_model_wrapped]

    def inference_memory_requirements(self, dtype: torch.dtype | None) -> int:
        """Bytes for the residuals of a positive and a negative row per hint, and the hint's embedding. Its pass alternates with the denoiser's."""
        hint = self.cond_hint_original
        own = 0
        if hint is not None:
            pixels = hint.shape[-1] * hint.shape[-2]
            numbers = 2 * hint.shape[0] * _residual_numbers(self.control_model.config, pixels) + _HINT_PEAK_NUMBERS * pixels
            own = numbers * self.control_model.dtype.itemsize
        return own + super().inference_memory_requirements(dtype)

    def _forget_embedding(self) -> None:
        self._embeddings.clear()

    def pass_options(self) -> dict[str, Any]:
        """Further arguments of the network: numbers and texts that apply to all rows."""
        return {}

    @property
    def has_common_pass(self) -> bool:
        """Whether the pass is just `prepare_pass` and the unpatched network, so that it can run on any slot and row by row."""
        is_ours = type(self)._find_residuals is ControlNet._find_residuals and type(self)._run is ControlNet._run
        return is_ours and not self.control_model_wrapped.lora_patches

    def prepare_pass(self, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> tuple[dict[str, Tensor | None], Tensor]:
        """The network's arguments, on the latents' device, and the hint in the latents' size."""
        if self._predictor is None:
            raise ControlNetError(f"{self.name} was asked for residuals outside a run. Call pre_run first.")
        dtype = self.manual_cast_dtype or self.control_model.dtype
        hint = self._fit_hint(x_BCHW, batched_number, dtype)
        arguments = {
            "x": self._predictor.calculate_input(sigma_B, x_BCHW).to(dtype),
            "timesteps": self._predictor.timestep(sigma_B),
            "context": None if cond.get("c_crossattn") is None else cond["c_crossattn"].to(dtype),
            "y": None if cond.get("y") is None else cond["y"].to(dtype),
        }
        return arguments, hint

    def _find_residuals(self, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> Residuals:
        found, hint = self.prepare_pass(x_BCHW, sigma_B, cond, batched_number)
        arguments = {name: None if tensor is None else tensor.to(self.load_device) for name, tensor in found.items()}
        return self.place([residual.to(x_BCHW.device) for residual in self._run({**arguments, "hint": hint}, hint)])

    @property
    def kinds(self) -> frozenset[str]:
        """The lists of residuals that this link fills."""
        return RESIDUAL_KINDS

    def place(self, residuals: Sequence[Tensor]) -> Residuals:
        """The network's residuals by list."""
        return place_residuals(residuals)

    @torch.no_grad()
    def _run(self, arguments: dict[str, Any], hint: Tensor) -> Sequence[Tensor]:
        arguments = {**arguments, **self.pass_options()}
        wrapper = self.transformer_options.get("controlnet_model_function_wrapper")
        if wrapper is not None:
            wrapped: Sequence[Tensor] = wrapper(**arguments, model=self, inner_model=self.control_model)
            return wrapped
        residuals: Sequence[Tensor] = self.control_model(**arguments, hint_embedding=self.embed_hint(hint, self.control_model))
        return residuals

    def has_embedding(self, device: torch.device) -> bool:
        """Whether the run's hint has been embedded on a device."""
        return device in self._embeddings

    def embed_hint(self, hint: Tensor, network: Any) -> Tensor:
        """The embedding of the run's hint, computed by a copy of the network on the hint's device. Computed once per device."""
        found = self._embeddings.get(hint.device)
        if found is None:
            found = network.embed_hint(hint)
            memory_management.synchronize(hint.device)  # other threads may read it on streams that are not ordered with this one
            self._embeddings[hint.device] = found
        return found

    def embedding_on(self, device: torch.device) -> Tensor:
        """The embedding that was computed on a device."""
        return self._embeddings[device]


class T2IAdapter(ControlBase):
    """A T2I-Adapter whose network is shared by all copies. Its features are computed once per run and added in the UNet's input blocks."""

    def __init__(self, t2i_model: AdapterNetwork, device: torch.device | None = None, *, patcher: ModelPatcher | None = None) -> None:
        self.control_model_wrapped = patcher or ModelPatcher(
            t2i_model,
            load_device=device or memory_management.get_torch_device(),
            offload_device=memory_management.unet_offload_device(),
            current_device=next(t2i_model.parameters()).device,
        )
        super().__init__(self.control_model_wrapped.load_device)
        self.t2i_model = t2i_model
        self._unet_config: Any = None
        self._features: list[Tensor] | None = None

    def copy(self) -> T2IAdapter:
        """The same network with the same settings, in no chain."""
        other = type(self)(self.t2i_model, patcher=self.control_model_wrapped)
        self.copy_to(other)
        return other

    def check_fits(self, model: KModel) -> None:
        """Raises: ControlNetError if the features' widths differ from those of the denoiser's levels."""
        theirs: Any = getattr(model.diffusion_model, "config", {})
        if "block_out_channels" not in theirs:
            raise ControlNetError(
                f"{self.name} is a T2I-Adapter, but the checkpoint in use is no UNet. Choose a ControlNet of the checkpoint's family."
            )
        widths = list(theirs.block_out_channels)
        is_sdxl = theirs.projection_class_embeddings_input_dim is not None
        if self.t2i_model.is_for_sdxl is not is_sdxl or self.t2i_model.widths[: len(widths)] != widths[: len(self.t2i_model.widths)]:
            own = "SDXL" if self.t2i_model.is_for_sdxl else "SD 1.x"
            raise ControlNetError(
                f"{self.name} does not fit the checkpoint in use: it is a T2I-Adapter for {own} with levels {self.t2i_model.widths} wide, but the "
                f"checkpoint is {family_of(theirs)} with {widths}. Choose one of the checkpoint's family."
            )

    def pre_run(self, model: KModel, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Before the first step: compute noise levels, and note where to add features. Raises: ControlNetError."""
        super().pre_run(model, percent_to_timestep_function)
        self.check_fits(model)
        self._unet_config = model.diffusion_model.config

    def cleanup(self) -> None:
        """After the last step: drop what was kept for the run."""
        super().cleanup()
        self._unet_config = self._features = None

    def get_models(self) -> list[ModelPatcher]:
        """Networks of the whole chain, each once."""
        found = super().get_models()
        return found if any(self.control_model_wrapped.is_clone(one) for one in found) else [*found, self.control_model_wrapped]

    def inference_memory_requirements(self, dtype: torch.dtype | None) -> int:
        """Bytes for the features of one row per hint, doubled for the pass that computes them."""
        hint, own = self.cond_hint_original, 0
        if hint is not None:
            positions = hint.shape[0] * hint.shape[-1] * hint.shape[-2] // HINT_STEP_PX**2
            own = 2 * positions * sum(self.t2i_model.widths) * self.t2i_model.dtype.itemsize
        return own + super().inference_memory_requirements(dtype)

    def _forget_embedding(self) -> None:
        self._features = None

    def _find_residuals(self, x_BCHW: Tensor, sigma_B: Tensor, cond: dict[str, Any], batched_number: int) -> Residuals:
        if self._unet_config is None:
            raise ControlNetError(f"{self.name} was asked for residuals outside a run. Call pre_run first.")
        network = self.t2i_model
        hint = self._fit_hint(x_BCHW, batched_number, network.dtype, network.hint_channels, network.hint_step_px)
        if self._features is None:
            with torch.no_grad():
                self._features = network(hint)
        rows = x_BCHW.shape[0]
        features = [one.repeat(rows // one.shape[0], 1, 1, 1).to(x_BCHW.device) for one in self._features]
        inputs, middle = place_features(features, self._unet_config)
        return {"input": inputs, "middle": middle, "output": []}


RESIDUAL_KINDS = frozenset(("middle", "output"))
"""The lists that `place_residuals` fills: a ControlNet adds nothing in the input blocks."""


def place_residuals(residuals: Sequence[Tensor]) -> Residuals:
    """A ControlNet's residuals (outermost first, the middle's last) by where they are added."""
    return {"input": [], "middle": [residuals[-1]], "output": list(residuals[:-1])}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def family_of(config: Any) -> str:
    """The common name of the family of a network with this config."""
    if config["projection_class_embeddings_input_dim"] is not None:
        return "SDXL"
    return {768: "SD 1.x", 1024: "SD 2.x"}.get(config["cross_attention_dim"], f"a model with text features {config['cross_attention_dim']} wide")


def _residual_numbers(config: Any, pixels: int) -> int:
    """How many numbers all residuals of one row have."""
    positions, widths = pixels // HINT_STEP_PX**2, list(config.block_out_channels)
    levels = sum((config.layers_per_block + 1) * width * positions // 4**level for level, width in enumerate(widths))
    return int(levels + widths[0] * positions)
