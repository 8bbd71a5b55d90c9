"""Family: a frozen description of one family of networks, which loader, engine, LoRA, planner and page read.

Must not know files beyond their names and shapes, devices or jobs; what it builds is without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
"""What a prompt becomes: text (B, L, D), or "crossattn" with further tensors of one row per prompt."""

GUIDANCE = "guidance"
"""The condition (B,), and the network's input of that name, that carries distilled guidance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundDenoiser:
    """A denoiser in a file: where it lies, and the arguments that its network is built with.

    `context_width` is the width of the text features that it reads, 0 where the family checks that itself. `is_inpaint`: it takes a mask and a
    masked picture beside the latents.
    """

    part: Part
    config: Mapping[str, Any]
    context_width: int = 0
    is_inpaint: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A network beside the denoiser: a text encoder or the VAE.

    `find`: where such networks lie in a file, which may be the checkpoint or an additional module. `takes`: whether one of them is this component of
    that denoiser. `build` makes it from its shapes, `plan` names the source of each weight. `width`: of the text features it gives.
    `reads_embeddings`: textual inversion has vectors of its width. `usual_file`: what users know its file by, with its size, for a message.
    """

    name: str
    title: str
    find: Callable[[TensorFile], Sequence[Part]]
    takes: Callable[[TensorFile, Part, FoundDenoiser], bool] = lambda file, part, found: True
    build: Callable[[TensorFile, Part], nn.Module]
    plan: Callable[[nn.Module, TensorFile, Part], LoadPlan]
    width: Callable[[TensorFile, Part], int] = lambda file, part: 0
    make_tokenizer: Callable[[], Any] | None = None
    reads_embeddings: bool = False
    usual_file: str = ""


class TextEngine(Protocol):
    """One text encoder as prompts meet it. ClassicTextProcessingEngine is CLIP's."""

    comma_padding_backtrack: int

    def __call__(self, texts: Sequence[str]) -> Any: ...

    def set_clip_skip(self, clip_skip: int) -> None: ...

    def set_emphasis(self, name: str) -> None: ...

    def get_prompt_lengths(self, prompt: str) -> tuple[int, int]: ...

    def take_generation_params(self) -> dict[str, str]: ...


class Encoder(Protocol):
    """The loaded model as a family's `encode` meets it: its engines by position, and the numbers of `text_settings` as attributes."""

    native_size_px: int

    def run_text_engine(self, index: int, prompt: Sequence[str]) -> Any:
        """What one of the text engines makes of a list of prompts, on the denoiser's device."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """`distilled`: the default of the number that the network takes in place of CFG, None for a family without one.

    A network of the family takes it where its program reads "guidance" (Flux.1-dev does, schnell does not). The engine then adds that condition to
    what `encode` returns, from the request's distilled CFG scale.
    """

    distilled: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PageDefaults:
    """What the page proposes for the family."""

    sampler: str = "Euler"
    schedule: str = "Automatic"
    steps: int = 20
    cfg: float = 7.0
    width_px: int = 512
    height_px: int = 512


BuildTextEngines = Callable[[Mapping[str, nn.Module], Mapping[str, Any], "EmbeddingDatabase"], Sequence[TextEngine]]
"""(text encoders, tokenizers, embeddings), all by component, -> text engines."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """`rank` orders identification: families of a lower rank are asked first. `line` is the name that users know its models by.

    `identify` finds the family's denoiser in a file. Raises CheckpointError for a relative that is not supported, by name.
    `key_map`: of a built denoiser. `build_program` cuts it into segments. `find_prediction` (file, found, loaded denoiser) says what it
    predicts. `native_size_px`: side of the pictures that it was trained on, by its prediction. `encode` is the text recipe;
    `text_settings` are numbers that it reads from the model and callers may set. `attends_jointly`: text and picture share one attention, where
    a text repeated would count twice; conditions of different lengths then never join by repetition. `default_schedule` is what Automatic means
    where the sampler leaves it open. `join_inpaint` (mask in pixels, masked picture's latents) gives the further channels of an inpainting model.
    `compute_dtypes`: what its network may compute in, best first; a device takes the first that it runs at full rate. `forge_flags` are the
    names by which extensions ask ("is_sdxl"). `join_checkpoint` (denoiser, VAE, text
    encoders) writes a single file's tensors.
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
    join_inpaint: Callable[[Tensor, Tensor], Tensor] = mask_before_picture
    compute_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    default_schedule: str = "automatic"
    guidance: Guidance = Guidance()
    defaults: PageDefaults = PageDefaults()
    denoiser_title: str = "UNet"
    forge_flags: frozenset[str] = frozenset()
