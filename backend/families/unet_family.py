"""Shared by the Stable Diffusion families: diffusers' UNet, AutoencoderKL, CLIP text encoders, and their places in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backend import checkpoint_config, checkpoint_identity, key_layout
from backend.checkpoint_config import INPAINT_CHANNELS, SD15, SD20, SDXL, SDXL_REFINER, UNetShape
from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part, find_text_encoders, find_unet, find_vae
from backend.checkpoint_prediction import EPSILON, PredictionSpec, read_prediction
from backend.families.family import Component, FoundDenoiser
from backend.families.key_map import KeyMap
from backend.families.latent_format import LatentFormat
from backend.modules.k_prediction import Prediction
from backend.nn.program import Program
from backend.nn.unet_program import build_program
from backend.original_config import add_original_names
from backend.state_dict import build_empty, plan_text_encoder, plan_vae
from backend.text_processing.clip_tokenizer import EOS_TOKEN_ID, build_clip_tokenizer

_PUBLISHED_TEXT_WIDTHS = {768: "clip_l", 1280: "clip_g"}
_CHANNELS = 4
_UNSUPPORTED_INPUTS = {
    5: "a depth-to-image model (5 input channels)",
    7: "the x4 upscaler model (7 input channels)",
    8: "an InstructPix2Pix model (8 input channels)",
}
_UNCLIP_WIDTHS = (1536, 2048)


def identify_unet(file: TensorFile, name: str) -> FoundDenoiser | None:
    """The file's UNet if it belongs to the family `name`. Raises: CheckpointError for unsupported relatives of these families."""
    part = find_unet(file.infos)
    kind = checkpoint_identity.identify(file.infos)
    if part is None or (kind is not None and kind.never_holds_unet):
        return None
    shape = checkpoint_config.read_unet_shape(file, part)
    text_prefixes = [text.prefix for text in find_text_encoders(file.infos)]
    if find_unet_family(file, shape, text_prefixes=text_prefixes) != name:
        return None
    return describe_unet(part, shape, name)


def find_unet_family(file: TensorFile, shape: UNetShape, *, text_prefixes: Sequence[str] = ()) -> str:
    """The name of a UNet's family: "sd15", "sd20", "sdxl" or "sdxl_refiner".

    Published widths (context 768, 1024, 1280, 2048) decide first; for other widths the extra vector, the file's text encoders, and the kind of
    projections do.
    Raises: CheckpointError for unsupported relatives, which the message names.
    """
    _refuse_relatives(file, shape)
    if shape.vector_width is not None:
        is_refiner = shape.vector_width == 2560 or "conditioner.embedders.0.model." in text_prefixes
        return SDXL_REFINER if is_refiner else SDXL
    if shape.context_width in (768, 1024):
        return SD15 if shape.context_width == 768 else SD20
    if "cond_stage_model.model." in text_prefixes:
        return SD20
    return SD20 if shape.has_linear_projections else SD15


def _refuse_relatives(file: TensorFile, shape: UNetShape) -> None:
    what = _UNSUPPORTED_INPUTS.get(shape.in_channels)
    if shape.vector_width in _UNCLIP_WIDTHS and shape.context_width == 1024:
        what = "an SD 2.1 unCLIP model"
    elif "edm_mean" in file.infos:
        what = "Playground v2.5, which is trained with another noise schedule (EDM)"
    elif any("encoder_hid_proj" in key for key in file.infos):
        what = "a Kolors-like model with another text encoder"
    elif what is None and shape.in_channels not in (_CHANNELS, INPAINT_CHANNELS):
        what = f"a model with {shape.in_channels} input channels"
    if what is not None:
        raise CheckpointError(
            f"{file.path.name}: is {what}. This is not supported; use an SD 1.x, SD 2.x or SDXL checkpoint, or an inpainting version of one."
        )


def describe_unet(part: Part, shape: UNetShape, name: str) -> FoundDenoiser:
    """Describe a UNet of this shape as a family's denoiser."""
    return FoundDenoiser(
        part=part,
        config=checkpoint_config.unet_config(shape, name),
        context_width=shape.context_width,
        is_inpaint=shape.in_channels == INPAINT_CHANNELS,
    )


def build_unet(found: FoundDenoiser) -> nn.Module:
    """Without memory."""
    return build_empty(lambda: cast("nn.Module", UNet2DConditionModel(**found.config)))


def unet_key_map(unet: nn.Module) -> KeyMap:
    """Names of the original layout, for any number of levels."""
    return KeyMap(modules=key_layout.unet_module_names(cast("Mapping[str, Any]", unet.config)))


def build_unet_program(unet: Any) -> Program:
    """The program. Also adds the original configuration names to the network, for extensions that read them."""
    add_original_names(unet)
    return build_program(unet)


TextWriter = tuple[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]
"""Where a text encoder lies in a single file, and what turns transformers' names into those there."""


def join_unet_checkpoint(
    text_writers: Sequence[TextWriter], unet: nn.Module, vae: nn.Module, text_encoders: Sequence[nn.Module]
) -> dict[str, Tensor]:
    """One state dict in the original single-file layout, with a writer for each text encoder.

    Tensors are contiguous and share memory with the modules if only names change. Raises: ValueError for a wrong number of text encoders.
    """
    if len(text_writers) != len(text_encoders):
        raise ValueError(f"A single file has {len(text_writers)} text encoders, but {len(text_encoders)} were given. Pass all of them.")
    joined = _prefixed(key_layout.UNET_PREFIX, key_layout.unet_to_ldm(unet.state_dict(), cast("Mapping[str, Any]", unet.config)))
    joined.update(_prefixed(key_layout.VAE_PREFIX, key_layout.vae_to_ldm(vae.state_dict(), cast("Mapping[str, Any]", vae.config))))
    for (prefix, write), encoder in zip(text_writers, text_encoders, strict=True):
        joined.update(_prefixed(prefix, write(encoder.state_dict())))
    return {key: tensor.detach().contiguous() for key, tensor in joined.items()}


def _prefixed(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state_dict.items()}


# prediction


def find_unet_prediction(file: TensorFile, found: FoundDenoiser, unet: nn.Module) -> PredictionSpec:
    """The file's prediction type, else noise. Raises: CheckpointError for a continuous EDM schedule."""
    said = read_prediction(file, prefix=found.part.prefix)
    if said is None:
        return PredictionSpec(kind=EPSILON, source="the family's rule")
    if said.sigma_range is not None:
        raise CheckpointError(
            f"{file.path.name}: is trained with a continuous EDM noise schedule ({said.source}), as CosXL is. "
            "This is not supported; use the epsilon or v-prediction version of the model."
        )
    return said


def make_discrete_predictor(spec: PredictionSpec) -> Prediction:
    """The predictor with the noise schedule of all these families."""
    return Prediction(prediction_type=spec.kind, zero_terminal_snr=spec.has_zero_terminal_snr)


# VAE


def kl_vae(latent: LatentFormat, family_title: str) -> Component:
    """An AutoencoderKL for these latents, in the original layout or diffusers'."""
    scale = latent.scale if isinstance(latent.scale, float) else 1.0

    def build(file: TensorFile, part: Part) -> nn.Module:
        config = checkpoint_config.vae_config(file, part, channels=latent.channels, scale=scale, family_title=family_title)
        return build_empty(lambda: cast("nn.Module", AutoencoderKL(**config)))

    return Component(
        name="vae",
        title="VAE",
        find=lambda file: [part] if (part := find_vae(file.infos)) is not None else [],
        build=build,
        plan=plan_vae,
    )


# text encoders


def clip_l(takes: Callable[[TensorFile, Part, FoundDenoiser], bool]) -> Component:
    """OpenAI's CLIP-L."""
    return _clip("clip_l", "CLIP-L", takes, build=_build_clip, pad_token_id=EOS_TOKEN_ID)


def clip_g(takes: Callable[[TensorFile, Part, FoundDenoiser], bool]) -> Component:
    """OpenCLIP bigG, with its projection."""
    return _clip("clip_g", "OpenCLIP bigG", takes, build=partial(_build_clip, is_open_clip=True, is_projected=True))


def clip_h(takes: Callable[[TensorFile, Part, FoundDenoiser], bool], used_blocks: int) -> Component:
    """OpenCLIP H, read before its last block: files contain all blocks, or only the used ones."""

    def build(file: TensorFile, part: Part) -> nn.Module:
        num_layers = checkpoint_config.read_text_shape(file, part).num_layers
        is_full = part.layout is Layout.OPEN_CLIP and num_layers != used_blocks
        return _build_clip(file, part, is_open_clip=True, num_layers=num_layers - 1 if is_full else num_layers)

    return _clip("clip_h", "OpenCLIP-H", takes, build=build)


def _clip(
    name: str,
    title: str,
    takes: Callable[[TensorFile, Part, FoundDenoiser], bool],
    *,
    build: Callable[[TensorFile, Part], nn.Module],
    pad_token_id: int = 0,
) -> Component:
    return Component(
        name=name,
        title=title,
        find=lambda file: find_text_encoders(file.infos),
        takes=takes,
        build=build,
        plan=plan_text_encoder,
        width=text_width,
        make_tokenizer=lambda: build_clip_tokenizer(pad_token_id=pad_token_id),
        reads_embeddings=True,
    )


def _build_clip(file: TensorFile, part: Part, *, is_open_clip: bool = False, is_projected: bool = False, num_layers: int | None = None) -> nn.Module:
    shape = checkpoint_config.read_text_shape(file, part)
    layers = shape.num_layers if num_layers is None else num_layers
    arguments = checkpoint_config.text_config(shape, is_open_clip=is_open_clip, num_layers=layers)
    kind = CLIPTextModelWithProjection if is_projected else CLIPTextModel
    return build_empty(lambda: cast("nn.Module", kind(CLIPTextConfig(**arguments))))


def text_width(file: TensorFile, part: Part) -> int:
    """Width of a CLIP text encoder's features."""
    return checkpoint_config.read_text_shape(file, part).width


def is_the_only_one(file: TensorFile, part: Part, found: FoundDenoiser) -> bool:
    """For a family with one text encoder: any with the width that the UNet reads."""
    return text_width(file, part) == found.context_width


def is_slot(name: str) -> Callable[[TensorFile, Part, FoundDenoiser], bool]:
    """For a family with two text encoders: the one identified as `name` by prefix, published width or layout."""

    def takes(file: TensorFile, part: Part, found: FoundDenoiser) -> bool:
        shape = checkpoint_config.read_text_shape(file, part)
        slot = part.slot or _PUBLISHED_TEXT_WIDTHS.get(shape.width)
        if slot is None:
            slot = "clip_g" if part.layout is Layout.OPEN_CLIP or shape.projected_width is not None else "clip_l"
        return slot == name

    return takes


def encode_text_alone(side: Any, prompt: Sequence[str]) -> Any:
    """The features of the only text encoder, (B, L, D)."""
    return side.run_text_engine(0, prompt)
