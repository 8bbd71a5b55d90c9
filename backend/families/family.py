"""Family: a frozen description of one family of networks, read by loader, engine, LoRA, planner and page.

Must not know devices, jobs, or files beyond their names and shapes. The networks it builds take no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Part
from backend.checkpoint_prediction import PredictionSpec
from backend.families.inpainting import mask_before_picture
from backend.families.key_map import KeyMap
from backend.families.latent_format import LatentFormat
from backend.modules.k_prediction import AbstractPrediction
from backend.state_dict import LoadPlan

if TYPE_CHECKING:
    from backend.text_processing.textual_inversion import EmbeddingDatabase

Conditioning = Tensor | dict[str, Tensor]
"""An encoded prompt: text (B, L, D), or "crossattn" with further tensors that have one row per prompt."""

GUIDANCE = "guidance"
"""Name of the condition (B,), and of the network's input, for distilled guidance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundDenoiser:
    """A denoiser in a file: its part, and the arguments for building its network.

    `context_width` is the width of the text features it reads, 0 if the family checks that itself. `is_inpaint`: it takes a mask and a masked
    picture in addition to the latents. `takes_control_picture`: it takes the latents of a picture of edges or depth in addition to them.
    """

    part: Part
    config: Mapping[str, Any]
    context_width: int = 0
    is_inpaint: bool = False
    takes_control_picture: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A text encoder or the VAE.

    `find` returns such networks in a file, which may be the checkpoint or an additional module. `takes`: whether one of them is this component of
    that denoiser. `build` makes it from its shapes, `plan` names the source of each weight. `width`: the width of its text features.
    `make_tokenizer` builds its tokenizer, or `read_tokenizer` reads it from the encoder's file. `reads_embeddings`: textual inversion has vectors of
    its width. `usual_file`: its file's usual name and size, for messages. `is_optional`: the model works without it.
    """

    name: str
    title: str
    find: Callable[[TensorFile], Sequence[Part]]
    takes: Callable[[TensorFile, Part, FoundDenoiser], bool] = lambda file, part, found: True
    build: Callable[[TensorFile, Part], nn.Module]
    plan: Callable[[nn.Module, TensorFile, Part], LoadPlan]
    width: Callable[[TensorFile, Part], int] = lambda file, part: 0
    make_tokenizer: Callable[[], Any] | None = None
    read_tokenizer: Callable[[TensorFile, Part], Any] | None = None
    reads_embeddings: bool = False
    usual_file: str = ""
    is_optional: bool = False


class TextEngine(Protocol):
    """Turns prompts into conditions with one text encoder. ClassicTextProcessingEngine does it for CLIP."""

    comma_padding_backtrack: int

    def __call__(self, texts: Sequence[str]) -> Any: ...

    def set_clip_skip(self, clip_skip: int) -> None: ...

    def set_emphasis(self, name: str) -> None: ...

    def get_prompt_lengths(self, prompt: str) -> tuple[int, int]: ...

    def take_generation_params(self) -> dict[str, str]: ...


class Encoder(Protocol):
    """The loaded model as a family's `encode` sees it: its engines by position, and the `text_settings` as attributes."""

    native_size_px: int

    def run_text_engine(self, index: int, prompt: Sequence[str]) -> Any:
        """A list of prompts encoded by one of the text engines, on the denoiser's device."""
        ...


RescaleGuidance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, x0 of the positive prompt, combined x0), all (B, C, H, W), to the x0 that the sampler gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """`distilled`: the default guidance number that the network takes instead of CFG, None for a family without it. `rescale` changes what CFG
    combined; None leaves it.

    A network of the family takes it if its program reads "guidance" (Flux.1-dev does, schnell does not). The engine then adds that condition, with
    the request's distilled CFG scale, to the result of `encode`.
    """

    distilled: float | None = None
    rescale: RescaleGuidance | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PageVariant:
    """Models of the family that only their files' names tell, with other values. `names`: searched in the lower-case name."""

    names: re.Pattern[str]
    steps: int
    cfg: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PageDefaults:
    """The page's default values for the family. `preset`: the UI preset that covers it ("sd", "xl", "flux"), whose settings then apply instead; empty
    if none does. `variants`: the first whose names match a file replaces steps and CFG."""

    preset: str = ""
    variants: tuple[PageVariant, ...] = ()
    sampler: str = "Euler"
    schedule: str = "Automatic"
    steps: int = 20
    cfg: float = 7.0
    width_px: int = 512
    height_px: int = 512

    def for_name(self, stem: str) -> PageDefaults:
        """The values for a file of this name, itself if it is of the usual kind."""
        found = next((variant for variant in self.variants if variant.names.search(stem.lower())), None)
        return self if found is None else replace(self, steps=found.steps, cfg=found.cfg)


BuildTextEngines = Callable[[Mapping[str, nn.Module], Mapping[str, Any], "EmbeddingDatabase"], Sequence[TextEngine]]
"""(text encoders by component, tokenizers by component, embeddings) -> text engines."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """`rank` orders identification: families with a lower rank are asked first. `line` is the users' name for its models.

    `identify` finds the family's denoiser in a file. It raises CheckpointError for an unsupported relative, which the message names.
    `key_map` returns the names of a built denoiser. `build_program` cuts it into segments. `find_prediction` (file, found, loaded denoiser) says what
    it predicts. `native_size_px`: side of its training pictures, given its prediction. `encode` is the text recipe; `text_settings` are numbers that
    it reads from the model and callers may set. `attends_jointly`: text and picture share one attention, in which repeated text would count twice;
    conditions of different lengths are then never joined by repetition. `build_token_counter` returns a text engine without its network, for the
    token counter of the page; None means CLIP's. `default_schedule` is the meaning of Automatic if the sampler does not define it.
    `shift_of_tokens`: a flow's shift by the number of picture tokens and of steps, where the authors vary it; `always_shifts_by_size`: without being
    asked to. `latent_of_vae`: the latents that a loaded VAE's own statistics describe. `forge_shifts_table_alone`: Forge forgets the shift
    in computed schedules. `join_inpaint` (mask in pixels, masked picture's latents) returns the extra channels of an inpainting model.
    `edit_names`: words in the file names of models that were trained to edit reference pictures, where nothing else tells them.
    `reads_pictures`: its text encoder sees reference pictures, as `pictures` of the prompts, (H, W, 3) uint8 RGB arrays.
    `compute_dtypes`: dtypes its network may compute in, best first; a device uses the first that it runs at full speed. `forge_flags`: attribute
    names that extensions check ("is_sdxl"). `join_checkpoint` (denoiser, VAE, text encoders) returns the tensors of a single file.
    """

    name: str
    title: str
    rank: int
    line: str
    identify: Callable[[TensorFile], FoundDenoiser | None]
    build_denoiser: Callable[[FoundDenoiser], nn.Module]
    key_map: Callable[[nn.Module], KeyMap]
    build_program: Callable[[Any], Any]
    text_encoders: tuple[Component, ...]
    vae: Component
    latent: LatentFormat
    find_prediction: Callable[[TensorFile, FoundDenoiser, nn.Module], PredictionSpec]
    make_predictor: Callable[[PredictionSpec], AbstractPrediction]
    native_size_px: Callable[[PredictionSpec], int]
    build_text_engines: BuildTextEngines
    encode: Callable[[Any, Sequence[str]], Conditioning]
    join_checkpoint: Callable[[nn.Module, nn.Module, Sequence[nn.Module]], dict[str, Tensor]]
    text_settings: Mapping[str, float] = field(default_factory=dict)
    reads_size: bool = False
    attends_jointly: bool = False
    reads_pictures: bool = False
    build_token_counter: Callable[[], TextEngine] | None = None
    shift_of_tokens: Callable[[int, int], float] | None = None
    always_shifts_by_size: bool = False
    latent_of_vae: Callable[[nn.Module], LatentFormat] | None = None
    forge_shifts_table_alone: bool = False
    join_inpaint: Callable[[Tensor, Tensor], Tensor] = mask_before_picture
    compute_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    default_schedule: str = "automatic"
    guidance: Guidance = Guidance()
    defaults: PageDefaults = PageDefaults()
    denoiser_title: str = "UNet"
    forge_flags: frozenset[str] = frozenset()
    edit_names: tuple[str, ...] = ()
