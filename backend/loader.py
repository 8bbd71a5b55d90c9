"""From a checkpoint file to a loaded model.

The keys and shapes of the file alone tell the family and every network's configuration; no hub and no configuration file is needed. Networks are
built without memory, checked against the file, and then filled tensor by tensor in the type and on the device they shall have.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backend import checkpoint_config, checkpoint_identity, memory_management
from backend.checkpoint_config import SD15, SD20, SDXL, SDXL_REFINER, TextShape, UNetShape
from backend.checkpoint_file import CheckpointError as CheckpointError
from backend.checkpoint_file import TensorFile, open_tensor_file
from backend.checkpoint_layout import Layout, Part, find_text_encoders, find_unet, find_vae
from backend.checkpoint_prediction import EPSILON, V_PREDICTION, PredictionSpec, predicts_velocity, read_prediction
from backend.denoiser_types import choose_denoiser_types
from backend.diffusion_engine.base import EngineParts, ForgeDiffusionEngine, ModelConfig
from backend.diffusion_engine.sd15 import StableDiffusion
from backend.diffusion_engine.sd20 import StableDiffusion2
from backend.diffusion_engine.sdxl import StableDiffusionXL, StableDiffusionXLRefiner
from backend.foreign_json import parse_resolution
from backend.memory.dtype_policy import dtype_from_flag
from backend.modules.k_model import KModel
from backend.modules.k_prediction import Prediction
from backend.parallel.vae_decoding import decode_on_all_slots
from backend.patcher.clip import CLIP
from backend.patcher.unet import UnetPatcher
from backend.patcher.vae import VAE
from backend.state_dict import LoadPlan, assign_tensors, build_empty, check_plan, matrix_dtypes, plan_text_encoder, plan_unet, plan_vae
from backend.storage.kinds import is_compact
from backend.storage.running import set_types
from backend.text_processing.clip_tokenizer import EOS_TOKEN_ID, build_clip_tokenizer
from backend.text_processing.textual_inversion import EmbeddingDatabase

if TYPE_CHECKING:
    from backend.args import BackendConfig

logger = logging.getLogger(__name__)

_ENGINES: dict[str, type[ForgeDiffusionEngine]] = {
    SD15: StableDiffusion,
    SD20: StableDiffusion2,
    SDXL: StableDiffusionXL,
    SDXL_REFINER: StableDiffusionXLRefiner,
}
_TEXT_SLOTS = {SD15: ("clip_l",), SD20: ("clip_h",), SDXL: ("clip_l", "clip_g"), SDXL_REFINER: ("clip_g",)}
_TEXT_NAMES = {"clip_l": "CLIP-L", "clip_h": "OpenCLIP-H", "clip_g": "OpenCLIP bigG"}
_PUBLISHED_TEXT_WIDTHS = {768: "clip_l", 1280: "clip_g"}
_SD2_USED_BLOCKS = 23
_QUANTISED_KEYS = ("bitsandbytes__nf4", "bitsandbytes__fp4", ".scale_weight", ".comfy_quant", ".weight_scale")
_PICK_MODULE = "and choose it under 'VAE / Text Encoder'"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Located:
    """A part and the open file it lies in."""

    file: TensorFile
    part: Part


@dataclass(frozen=True, kw_only=True, slots=True)
class _LocatedText(_Located):
    """A text encoder in a file, its shape read."""

    shape: TextShape


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sources:
    """What will be loaded from where."""

    family: str
    unet: _Located
    unet_shape: UNetShape
    vae: _Located
    texts: dict[str, _LocatedText]


def load_checkpoint(
    path: Path,
    *,
    config: BackendConfig,
    additional_modules: Sequence[Path] = (),
    unet_storage_dtype: torch.dtype | None = None,
    embedding_dirs: Sequence[Path] = (),
) -> ForgeDiffusionEngine:
    """The model in `path`. VAE and text encoders in `additional_modules` take the place of the file's own.

    `unet_storage_dtype` overrides the flags and the device's rule. Nothing is placed on a GPU before it is used, unless it fits there at once.
    Raises: CheckpointError for any file that does not make a model; no file is changed, moved or deleted.
    """
    with ExitStack() as stack:
        main = stack.enter_context(open_tensor_file(Path(path)))
        extras = [stack.enter_context(open_tensor_file(Path(extra))) for extra in additional_modules]
        sources = _find_sources(main, extras)
        engine = _build_engine(sources, main, config, unet_storage_dtype, embedding_dirs)
    _log_loaded(engine, main.path, extras)
    return engine


def _log_loaded(engine: ForgeDiffusionEngine, path: Path, extras: Sequence[TensorFile]) -> None:
    model: Any = engine.forge_objects.unet.model
    prediction = engine.model_config.prediction
    logger.info(
        "Loaded %s: %s%s, predicts %s (%s), UNet stored in %s and computed in %s, VAE in %s%s.",
        path.name,
        checkpoint_config.FAMILY_TITLES[engine.family],
        " inpainting" if engine.is_inpaint else "",
        "v" if prediction.kind == V_PREDICTION else "noise",
        prediction.source,
        _dtype_text(model.storage_dtype),
        _dtype_text(model.computation_dtype),
        _dtype_text(engine.forge_objects.vae.vae_dtype),
        "".join(f", with {extra.path.name}" for extra in extras),
    )


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- what is where ------------------------------------------------------------------------------------------------------------------


def _find_sources(main: TensorFile, extras: Sequence[TensorFile]) -> _Sources:
    _refuse_quantised(main)
    for extra in extras:
        _refuse_useless_extra(extra)
    unet = _Located(file=main, part=_unet_part(main))
    shape = checkpoint_config.read_unet_shape(main, unet.part)
    family = checkpoint_config.find_family(main, shape, text_prefixes=[part.prefix for part in find_text_encoders(main.infos)])
    return _Sources(
        family=family,
        unet=unet,
        unet_shape=shape,
        vae=_find_vae(main, extras, family),
        texts=_find_texts(main, extras, family, shape.context_width),
    )


def _refuse_quantised(file: TensorFile) -> None:
    found = next((key for key in file.infos if key.endswith(_QUANTISED_KEYS)), None)
    if found is not None:
        raise CheckpointError(
            f"{file.path.name}: holds quantised weights ({found}), which are not supported. "
            "Use an fp32, fp16, bf16 or plain fp8 version of this model."
        )


def _unet_part(file: TensorFile) -> Part:
    kind = checkpoint_identity.identify(file.infos)
    part = find_unet(file.infos)
    if part is not None and (kind is None or not kind.never_holds_unet):
        return part
    if kind is not None:
        what = kind.name if kind.name.endswith("checkpoint") else f"{kind.name}, not a checkpoint"
        raise CheckpointError(f"{file.path.name}: is {what}. {kind.remedy}.")
    if not file.infos:
        raise CheckpointError(f"{file.path.name}: holds no tensors at all. Download it again, and compare its size with the one on the model's page.")
    raise CheckpointError(
        f"{file.path.name}: matches no known model ({len(file.infos)} tensors, the first is {next(iter(file.infos))}). "
        "SD 1.x, SD 2.x and SDXL checkpoints can be loaded. Check that the right file was downloaded."
    )


def _refuse_useless_extra(file: TensorFile) -> None:
    if find_vae(file.infos) is not None or find_text_encoders(file.infos):
        return
    kind = checkpoint_identity.identify(file.infos)
    what = f"is {kind.name}. {kind.remedy}" if kind is not None else "holds neither a VAE nor a CLIP text encoder"
    raise CheckpointError(f"{file.path.name}: was chosen as VAE / Text Encoder, but {what}. Take it out of 'VAE / Text Encoder'.")


def _find_vae(main: TensorFile, extras: Sequence[TensorFile], family: str) -> _Located:
    for file in [*reversed(extras), main]:
        part = find_vae(file.infos)
        if part is not None:
            return _Located(file=file, part=part)
    raise CheckpointError(
        f"{main.path.name}: has no VAE. Put an {checkpoint_config.FAMILY_TITLES[family]} VAE into models/VAE {_PICK_MODULE}, "
        "or use a checkpoint that has one."
    )


def _find_texts(main: TensorFile, extras: Sequence[TensorFile], family: str, context_width: int) -> dict[str, _LocatedText]:
    """The family's text encoders by slot; files named later take the place of earlier ones."""
    found: dict[str, _LocatedText] = {}
    wrong: list[_LocatedText] = []
    for file in [main, *extras]:
        for part in find_text_encoders(file.infos):
            located = _LocatedText(file=file, part=part, shape=checkpoint_config.read_text_shape(file, part))
            slot = _slot_of(located, family)
            if slot is None or (len(_TEXT_SLOTS[family]) == 1 and located.shape.width != context_width):
                wrong.append(located)
            else:
                found[slot] = located
    missing = [slot for slot in _TEXT_SLOTS[family] if slot not in found]
    if missing:
        raise CheckpointError(_missing_text_message(main, family, missing, wrong, context_width))
    total_width = sum(located.shape.width for located in found.values())
    if total_width != context_width:
        widths = " and ".join(f"{_TEXT_NAMES[slot]} {located.shape.width} ({located.file.path.name})" for slot, located in found.items())
        raise CheckpointError(
            f"{main.path.name}: its UNet reads text features {context_width} wide, but the text encoders give {widths}. "
            "Choose text encoders of the same model family, or none."
        )
    return found


def _slot_of(located: _LocatedText, family: str) -> str | None:
    """The slot a text encoder takes in `family`, or None when the family has no use for it."""
    slots = _TEXT_SLOTS[family]
    if len(slots) == 1:
        return slots[0]
    slot = located.part.slot or _PUBLISHED_TEXT_WIDTHS.get(located.shape.width)
    if slot is None:
        slot = "clip_g" if located.part.layout is Layout.OPEN_CLIP or located.shape.projected_width is not None else "clip_l"
    return slot


def _missing_text_message(main: TensorFile, family: str, missing: Sequence[str], wrong: Sequence[_LocatedText], context_width: int) -> str:
    names = " and no ".join(_TEXT_NAMES[slot] for slot in missing)
    message = f"{main.path.name}: has no {names} text encoder, which {checkpoint_config.FAMILY_TITLES[family]} needs. "
    if wrong:
        others = ", ".join(f"the one in {located.file.path.name} is {located.shape.width} wide" for located in wrong)
        message += f"Its UNet reads text features {context_width} wide; {others}. "
    return f"{message}Put the text encoder's file into models/text_encoder {_PICK_MODULE}, or use a checkpoint that has one."


# --- building -----------------------------------------------------------------------------------------------------------------------


def _build_engine(
    sources: _Sources, main: TensorFile, config: BackendConfig, unet_storage_dtype: torch.dtype | None, embedding_dirs: Sequence[Path]
) -> ForgeDiffusionEngine:
    unet = build_empty(lambda: UNet2DConditionModel(**checkpoint_config.unet_config(sources.unet_shape, sources.family)))
    vae_config = checkpoint_config.vae_config(sources.vae.file, sources.vae.part, sources.family)
    vae = build_empty(lambda: AutoencoderKL(**vae_config))
    texts = {slot: _empty_text_encoder(located, slot, sources.family) for slot, located in _in_slot_order(sources).items()}
    unet_plan = _checked(plan_unet(unet, sources.unet.file, sources.unet.part), sources.unet, "UNet")
    vae_plan = _checked(plan_vae(vae, sources.vae.file, sources.vae.part), sources.vae, "VAE")
    text_plans = {
        slot: _checked(plan_text_encoder(texts[slot], located.file, located.part), located, f"{_TEXT_NAMES[slot]} text encoder")
        for slot, located in sources.texts.items()
    }
    # Everything has been checked; only now are weights read, so that a wrong file costs no memory.
    clip = _load_clip(texts, text_plans, sources, config)
    vae_patcher = _load_vae(vae, vae_plan, sources, config)
    unet_patcher, prediction = _load_unet(unet, unet_plan, sources, config, unet_storage_dtype)
    parts = EngineParts(
        config=ModelConfig(
            family=sources.family,
            unet_config=dict(unet.config),
            vae_config=dict(vae.config),
            latent_scale=checkpoint_config.LATENT_SCALES[sources.family],
            prediction=prediction,
        ),
        unet=unet_patcher,
        clip=clip,
        vae=vae_patcher,
        embeddings=_build_embeddings(clip, embedding_dirs),
        filename=main.path,
        native_size_px=_native_size_px(main, sources.family, prediction),
        metadata=main.metadata,
    )
    return _ENGINES[sources.family](parts)


def _in_slot_order(sources: _Sources) -> dict[str, _LocatedText]:
    return {slot: sources.texts[slot] for slot in _TEXT_SLOTS[sources.family]}


def _checked(plan: LoadPlan, located: _Located, what: str) -> LoadPlan:
    check_plan(plan, located.file, what)
    if plan.unexpected and located.part.prefix:
        logger.debug("%s: %d tensors of its %s are not used (first: %s).", located.file.path.name, len(plan.unexpected), what, plan.unexpected[0])
    return plan


def _empty_text_encoder(located: _LocatedText, slot: str, family: str) -> nn.Module:
    is_open_clip = slot != "clip_l"
    num_layers = located.shape.num_layers
    if family == SD20 and located.part.layout is Layout.OPEN_CLIP and num_layers != _SD2_USED_BLOCKS:
        num_layers -= 1  # SD2.x reads the tower before its last block; files that were converted back hold the 23 used blocks alone
    arguments = checkpoint_config.text_config(located.shape, is_open_clip=is_open_clip, num_layers=num_layers)
    if slot == "clip_g":
        return build_empty(lambda: cast("nn.Module", CLIPTextModelWithProjection(CLIPTextConfig(**arguments))))
    return build_empty(lambda: cast("nn.Module", CLIPTextModel(CLIPTextConfig(**arguments))))


def _count_bytes(networks: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """What their weights will take in this type."""
    return sum(parameter.numel() for network in networks for parameter in network.parameters()) * dtype.itemsize


def _load_clip(encoders: dict[str, nn.Module], plans: dict[str, LoadPlan], sources: _Sources, config: BackendConfig) -> CLIP:
    flag_dtype = dtype_from_flag(config.clip_dtype or config.all_in)
    device = memory_management.text_encoder_device(_count_bytes(encoders.values(), flag_dtype or memory_management.text_encoder_dtype()))
    storage_dtype = flag_dtype or memory_management.text_encoder_dtype(device)
    computes_directly = not is_compact(storage_dtype) and memory_management.supports_dtype(device, storage_dtype)
    computation_dtype = storage_dtype if computes_directly else memory_management.get_computation_dtype(device)
    for slot, encoder in encoders.items():
        assign_tensors(encoder, plans[slot], sources.texts[slot].file, storage_dtype=storage_dtype, computation_dtype=computation_dtype)
        set_types(encoder, storage_dtype, computation_dtype)
    tokenizers = {slot: build_clip_tokenizer(pad_token_id=EOS_TOKEN_ID if slot == "clip_l" else 0) for slot in encoders}
    return CLIP(encoders, tokenizers)


def _load_vae(vae: AutoencoderKL, plan: LoadPlan, sources: _Sources, config: BackendConfig) -> VAE:
    flag_dtype = dtype_from_flag(config.vae_dtype)
    device = memory_management.vae_device(_count_bytes([vae], flag_dtype or memory_management.vae_dtype(memory_management.get_torch_device())))
    dtype = flag_dtype or memory_management.vae_dtype(device)
    assign_tensors(vae, plan, sources.vae.file, storage_dtype=dtype)
    return VAE(vae, device=device, dtype=dtype, slot_decoder=decode_on_all_slots)


def _load_unet(
    unet: UNet2DConditionModel, plan: LoadPlan, sources: _Sources, config: BackendConfig, wanted_dtype: torch.dtype | None
) -> tuple[UnetPatcher, PredictionSpec]:
    num_parameters = sum(parameter.numel() for parameter in unet.parameters())
    types = choose_denoiser_types(
        matrix_dtypes(sources.unet.file, sources.unet.part),
        num_parameters,
        wanted=wanted_dtype or dtype_from_flag(config.unet_dtype or config.all_in),
    )
    storage_dtype, computation_dtype = types.storage_dtype, types.computation_dtype
    load_device = memory_management.unet_inital_load_device(num_parameters, storage_dtype)
    assign_tensors(unet, plan, sources.unet.file, storage_dtype=storage_dtype, computation_dtype=computation_dtype, device=load_device)
    prediction = _find_prediction(unet, sources)
    predictor = Prediction(prediction_type=prediction.kind, zero_terminal_snr=prediction.has_zero_terminal_snr)
    model = KModel(unet, predictor, storage_dtype=storage_dtype, computation_dtype=computation_dtype)
    return UnetPatcher.from_model(model), prediction


def _find_prediction(unet: UNet2DConditionModel, sources: _Sources) -> PredictionSpec:
    said = read_prediction(sources.unet.file, prefix=sources.unet.part.prefix)
    if said is not None:
        if said.sigma_range is not None:
            raise CheckpointError(
                f"{sources.unet.file.path.name}: is trained with a continuous EDM noise schedule ({said.source}), as CosXL is. "
                "This is not supported; use the epsilon or v-prediction version of the model."
            )
        return said
    if sources.family == SD20 and sources.unet_shape.in_channels == 4:
        return PredictionSpec(kind=V_PREDICTION if predicts_velocity(unet) else EPSILON, source="told by a test run of the UNet")
    return PredictionSpec(kind=EPSILON, source="the family's rule")


def _build_embeddings(clip: CLIP, folders: Sequence[Path]) -> EmbeddingDatabase:
    slots = list(clip.tokenizer)
    widths = {slot: int(cast("Any", clip.cond_stage_model[slot]).config.hidden_size) for slot in slots}
    database = EmbeddingDatabase(clip.tokenizer[slots[0]], widths)
    for folder in folders:
        database.add_embedding_dir(folder)
    database.load_textual_inversion_embeddings()
    return database


def _native_size_px(file: TensorFile, family: str, prediction: PredictionSpec) -> int:
    """The side the model was trained on: the file's own word for it, else the family's; SD 2.x that predicts v is the 768 model."""
    sides = parse_resolution(file.metadata.get("modelspec.resolution"))
    if sides is not None and sides[0] > 0:
        return sides[0]
    if family in (SDXL, SDXL_REFINER):
        return 1024
    return 768 if family == SD20 and prediction.kind == V_PREDICTION else 512
