"""One loaded model: its networks with their patchers, under the names that extensions know. Everything specific to its family is in `family_facts`.

Knows no files except the one it saves, no jobs and no options page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from backend import memory_management, profiler
from backend.families.family import GUIDANCE, Conditioning, Family, TextEngine
from backend.families.key_map import SAVED_DTYPE
from backend.patcher.weight_patches import without_weight_patches
from backend.storage.kinds import storage_of
from backend.unfinished_files import replacing

if TYPE_CHECKING:
    from backend.checkpoint_prediction import PredictionSpec
    from backend.families.latent_format import LatentFormat
    from backend.patcher.clip import CLIP
    from backend.patcher.unet import UnetPatcher
    from backend.patcher.vae import VAE
    from backend.text_processing.textual_inversion import EmbeddingDatabase


@dataclass(slots=True)
class ForgeObjects:
    """The patchers a job works with; extensions put their own clones into it."""

    unet: UnetPatcher
    clip: CLIP
    vae: VAE
    clipvision: Any = None

    def shallow_copy(self) -> ForgeObjects:
        """A second object with the same patchers."""
        return replace(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The checkpoint's family, and the arguments its networks were built with."""

    family: str
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    latent_scale: float | tuple[float, ...]
    prediction: PredictionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineParts:
    """The parts of an engine. `native_size_px` is the side length of the pictures the model was trained on. `latent`: with the VAE's statistics.
    `storage_notes`: what runs instead of the weights' storage that was asked for, in sentences for users."""

    family: Family
    config: ModelConfig
    unet: UnetPatcher
    clip: CLIP
    vae: VAE
    embeddings: EmbeddingDatabase
    filename: Path
    native_size_px: int
    latent: LatentFormat
    is_inpaint: bool = False
    takes_control_picture: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    storage_notes: tuple[str, ...] = ()


class ForgeDiffusionEngine:
    """A loaded model under the names extensions know. One job at a time uses it."""

    is_sd1 = is_sd2 = is_sdxl = is_sd3 = is_flux = False

    def __init__(self, parts: EngineParts) -> None:
        self.model_config = parts.config
        self.family_facts = parts.family
        self.family, self.family_title, self.denoiser_title = parts.family.name, parts.family.title, parts.family.denoiser_title
        self.latent_format = parts.latent
        self.matched_guesses: Sequence[str] = (self.family,)
        program = parts.unet.model.program
        self.use_distilled_cfg_scale = parts.family.guidance.distilled is not None and GUIDANCE in program.reads
        for flag in parts.family.forge_flags:
            setattr(self, flag, True)
        for name, value in parts.family.text_settings.items():
            setattr(self, name, value)
        self.native_size_px = parts.native_size_px
        self.metadata = dict(parts.metadata)
        self.storage_notes = parts.storage_notes
        self.filename = str(parts.filename)
        self.latent_scale = parts.config.latent_scale
        self.embeddings = parts.embeddings
        self.is_inpaint = parts.is_inpaint
        self.takes_control_picture = parts.takes_control_picture
        self.is_edit_model = parts.unet.most_references > 0 and any(word in parts.filename.stem.lower() for word in parts.family.edit_names)
        self.forge_objects = ForgeObjects(unet=parts.unet, clip=parts.clip, vae=parts.vae)
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
        self.current_lora_hash = str([])
        self.tiling_enabled = False
        tokenizers = {name: parts.clip.tokenizer[name] for name in parts.clip.tokenizer}
        encoders = dict(parts.clip.cond_stage_model.items())
        self.text_engines: tuple[TextEngine, ...] = tuple(parts.family.build_text_engines(encoders, tokenizers, parts.embeddings))

    # --- text -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_learned_conditioning(self, prompt: Sequence[str]) -> Conditioning:
        """Conditions for a list of prompts: (B, L, C) fp32, or {"crossattn": (B, L, C), "vector": (B, V), ...}, as the family's recipe returns them.

        A list with attributes `width`, `height` and `is_negative_prompt` (SdConditioning) tells the recipe the picture's size. If the network
        takes distilled guidance, "guidance" (B,) fp32 is included: the list's `distilled_cfg_scale`, else the family's default.
        """
        self._load_text_encoders()
        conditions = self.family_facts.encode(self, prompt)
        return self._with_guidance(conditions, prompt) if self.use_distilled_cfg_scale else conditions

    def _with_guidance(self, conditions: Conditioning, prompt: Sequence[str]) -> Conditioning:
        asked, default = getattr(prompt, "distilled_cfg_scale", None), self.family_facts.guidance.distilled
        by_name = {"crossattn": conditions} if isinstance(conditions, Tensor) else conditions
        text_BLC = by_name["crossattn"]
        scale = float(default if asked is None else asked)  # type: ignore[arg-type]  # a family without a default takes no guidance
        return {**by_name, GUIDANCE: torch.full((text_BLC.shape[0],), scale, device=text_BLC.device)}

    def set_clip_skip(self, clip_skip: int) -> None:
        """1 reads the text encoders' last layer, 2 the one before it. A family's minimum still applies."""
        for engine in self.text_engines:
            engine.set_clip_skip(clip_skip)

    def set_emphasis(self, name: str) -> None:
        """Choose how (word:1.2) is applied: "None", "Ignore", "Original" or "No norm"."""
        for engine in self.text_engines:
            engine.set_emphasis(name)

    def get_prompt_lengths_on_ui(self, prompt: str) -> tuple[int, int]:
        """(tokens used, tokens that fit) for a prompt without schedules."""
        return self.text_engines[0].get_prompt_lengths(prompt)

    def run_text_engine(self, index: int, prompt: Sequence[str]) -> Any:
        """Encode a prompt with one text engine. The result is on the UNet's device, so that losing the text encoder's slot loses no conditions.

        When memory runs out, more and more other models leave the text encoder's device. Raises: OutOfMemory."""
        patcher = self.forge_objects.clip.patcher
        run = partial(self.text_engines[index], prompt)
        with profiler.recorder().measure("text encoder", f"text encoder {index + 1}", device=patcher.load_device):
            encoded = memory_management.run_with_recovery(run, what="encoding the prompt", device=patcher.load_device, keep=[patcher])
        device = self.forge_objects.unet.load_device
        return encoded.to(device) if isinstance(encoded, Tensor) else tuple(tensor.to(device) for tensor in encoded)

    def _load_text_encoders(self) -> None:
        memory_management.load_model_gpu(self.forge_objects.clip.patcher)

    # --- pictures and latents -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Pictures BCHW, -1..1 -> latents BCHW as the UNet sees them (scaled), fp32."""
        return self.latent_format.from_vae(self.forge_objects.vae.encode(x.movedim(1, -1) * 0.5 + 0.5))

    @torch.no_grad()
    def decode_first_stage(self, x: Tensor) -> Tensor:
        """Latents BCHW as the UNet sees them -> pictures BCHW, -1..1, fp32."""
        pixels_BHWC = self.forge_objects.vae.decode(self.latent_format.to_vae(x.to(torch.float32)))
        return pixels_BHWC.movedim(-1, 1) * 2.0 - 1.0

    @torch.no_grad()
    def decode_first_stage_on_all_slots(self, x: Tensor) -> Tensor | None:
        """Like `decode_first_stage`, one picture per slot, on all slots at once. None with one slot, or if an extension wraps decoding."""
        vae = self.forge_objects.vae
        if vae.patcher.model_options.get("model_vae_decode_wrapper") is not None:
            return None
        pixels_BHWC = vae.decode_on_all_slots(self.latent_format.to_vae(x.to(torch.float32)))
        return None if pixels_BHWC is None else pixels_BHWC.movedim(-1, 1) * 2.0 - 1.0

    def get_first_stage_encoding(self, x: Tensor) -> Tensor:
        """Returns the latents unchanged: `encode_first_stage` has already sampled the posterior and scaled."""
        return x

    # --- facts ----------------------------------------------------------------------------------------------------------------------

    @property
    def parameterization(self) -> str:
        """ "v" or "eps"."""
        return "v" if self.model_config.prediction.kind == "v_prediction" else "eps"

    @property
    def first_stage_model(self) -> Any:
        return self.forge_objects.vae.first_stage_model

    @property
    def cond_stage_model(self) -> Any:
        return self.forge_objects.clip.cond_stage_model

    def is_webui_legacy_model(self) -> bool:
        """Whether the original WebUI supported the model's family."""
        return self.is_sd1 or self.is_sd2 or self.is_sdxl or self.is_sd3

    # --- saving ---------------------------------------------------------------------------------------------------------------------

    def save_unet(self, filename: str | Path) -> str:
        """Write only the UNet as `.safetensors` in the original layout, without prefix and LoRA. After an error there is no partial file."""
        model: Any = self.forge_objects.unet.model
        with without_weight_patches(model):
            return _save(model.key_map.to_original(model.diffusion_model.state_dict()), Path(filename), self.metadata)

    def save_checkpoint(self, filename: str | Path) -> str:
        """Write the whole model as one `.safetensors` file in the original layout, without LoRA. After an error there is no partial file."""
        text_encoders = list(self.forge_objects.clip.cond_stage_model.values())
        with without_weight_patches(self.forge_objects.unet.model), without_weight_patches(self.forge_objects.clip.cond_stage_model):
            joined = self.family_facts.join_checkpoint(self._unet(), self.forge_objects.vae.first_stage_model, text_encoders)
            return _save(joined, Path(filename), self.metadata)

    def _unet(self) -> Any:
        return cast("Any", self.forge_objects.unet.model).diffusion_model


def _save(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> str:
    from safetensors.torch import save_file  # only when something is saved

    path.parent.mkdir(parents=True, exist_ok=True)
    on_host = {key: _plain_on_host(tensor) for key, tensor in state_dict.items()}
    with replacing(path) as unfinished:
        save_file(on_host, unfinished, metadata={**metadata, "format": "pt"})
    return str(path)


def _plain_on_host(tensor: Tensor) -> Tensor:
    """A weight as a file has it: packed ones in half precision."""
    storage = storage_of(tensor)
    plain = storage.dequantize(SAVED_DTYPE) if storage.is_packed else tensor
    return storage_of(plain).to(torch.device("cpu")).tensor.contiguous()
