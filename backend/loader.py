"""Loads a model from a checkpoint file.

The file's keys and shapes determine the family and every network's configuration; no hub and no configuration file is needed. Networks are
built without memory, checked against the file, and then filled tensor by tensor in their final dtype on their final device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from backend import checkpoint_identity, memory_management
from backend.checkpoint_file import CheckpointError as CheckpointError
from backend.checkpoint_file import TensorFile, open_tensor_file
from backend.checkpoint_layout import Part
from backend.checkpoint_prediction import PredictionSpec
from backend.denoiser_types import PACKED, choose_denoiser_types, choose_text_encoder_types
from backend.diffusion_engine.base import EngineParts, ForgeDiffusionEngine, ModelConfig
from backend.diffusion_engine.faces import FACES
from backend.families import registry
from backend.families.family import Component, Family, FoundDenoiser
from backend.families.key_map import KeyMap
from backend.foreign_json import parse_resolution
from backend.memory.dtype_policy import dtype_from_flag
from backend.modules.k_model import KModel
from backend.parallel.vae.decoding import decode_on_all_slots
from backend.patcher.clip import CLIP
from backend.patcher.unet import UnetPatcher
from backend.patcher.vae import VAE
from backend.state_dict import LoadPlan, assign_tensors, check_plan, count_part_bytes, has_packed, matrix_dtypes, plan_denoiser
from backend.storage.choices import bits_per_weight
from backend.storage.kinds import describe_storage
from backend.storage.running import set_types
from backend.tensor_file import refusing_odd_shapes
from backend.text_processing.textual_inversion import EmbeddingDatabase

if TYPE_CHECKING:
    from backend.args import BackendConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Located:
    """A part and the open file that contains it."""

    file: TensorFile
    part: Part


@dataclass(frozen=True, slots=True)
class _WantedStorage:
    """How the denoiser's weights should be stored: a dtype, or a format; neither leaves it to the file and the device."""

    dtype: torch.dtype | None = None
    format: str | None = None

    @property
    def is_nothing(self) -> bool:
        return self.dtype is None and self.format is None

    @property
    def title(self) -> str:
        return self.format or _dtype_text(self.dtype or torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sources:
    """What will be loaded, and from which file."""

    family: Family
    found: FoundDenoiser
    main: TensorFile
    vae: _Located
    texts: Mapping[str, _Located]

    @property
    def denoiser(self) -> _Located:
        return _Located(file=self.main, part=self.found.part)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Networks:
    """The networks of a model without memory, and where their weights lie; text encoders by name."""

    sources: _Sources
    key_map: KeyMap
    denoiser: nn.Module
    vae: nn.Module
    texts: Mapping[str, nn.Module]
    denoiser_plan: LoadPlan
    vae_plan: LoadPlan
    text_plans: Mapping[str, LoadPlan]


def load_checkpoint(
    path: Path,
    *,
    config: BackendConfig,
    additional_modules: Sequence[Path] = (),
    unet_storage_dtype: torch.dtype | None = None,
    unet_format: str | None = None,
    embedding_dirs: Sequence[Path] = (),
) -> ForgeDiffusionEngine:
    """The model in `path`. VAE and text encoders in `additional_modules` replace the file's.

    `unet_storage_dtype` overrides the flags and the device's default; `unet_format` (a key of `storage.choices.FORMATS`) overrides both. A
    denoiser that the file has in low bits stays as it is. Networks move to a GPU when they are first used, or at once if they fit.
    Raises: CheckpointError for any file that is not a usable model. No file is changed, moved or deleted.
    """
    with ExitStack() as stack:
        main, *extras = (stack.enter_context(open_tensor_file(Path(name))) for name in (path, *additional_modules))
        networks = _plan_networks(main, extras)
        wanted = _WantedStorage(unet_storage_dtype or dtype_from_flag(config.unet_dtype or config.all_in), unet_format)
        engine = _build_engine(networks, main, config, wanted, embedding_dirs)
    _log_loaded(engine, main.path, extras)
    return engine


def check_files(path: Path, additional_modules: Sequence[Path] = ()) -> None:
    """What `load_checkpoint` checks before it reads weights. Raises: CheckpointError."""
    with ExitStack() as stack:
        main, *extras = (stack.enter_context(open_tensor_file(Path(name))) for name in (path, *additional_modules))
        _plan_networks(main, extras)


def _log_loaded(engine: ForgeDiffusionEngine, path: Path, extras: Sequence[TensorFile]) -> None:
    model: Any = engine.forge_objects.unet.model
    prediction = engine.model_config.prediction
    logger.info(
        "Loaded %s: %s%s, predicts %s (%s), %s stored in %s and computed in %s, VAE in %s%s.",
        path.name,
        engine.family_title,
        " inpainting" if engine.is_inpaint else "",
        prediction.meaning,
        prediction.source,
        engine.denoiser_title,
        describe_storage(model.diffusion_model),
        _dtype_text(model.computation_dtype),
        _dtype_text(engine.forge_objects.vae.vae_dtype),
        "".join(f", with {extra.path.name}" for extra in extras),
    )


def _dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- what is where ------------------------------------------------------------------------------------------------------------------


def _find_sources(main: TensorFile, extras: Sequence[TensorFile]) -> _Sources:
    family, found = _identify(main)
    for extra in extras:
        _refuse_useless_extra(extra, family)
    vae, texts = _find_vae(main, extras, family, found), _find_texts(main, extras, family, found)
    missing = [encoder for encoder in family.text_encoders if encoder.name not in texts and not encoder.is_optional]
    if vae is None or missing:
        raise CheckpointError(_missing_parts_message(main, extras, family, found, missing, lacks_vae=vae is None))
    _check_widths(main, family, texts, found)
    for extra in extras:
        _refuse_misfit(extra, family, found)
    return _Sources(family=family, found=found, main=main, vae=vae, texts=texts)


def _identify(file: TensorFile) -> tuple[Family, FoundDenoiser]:
    identified = registry.identify(file)
    if identified is not None:
        return identified
    kind = checkpoint_identity.identify(file.infos)
    if kind is not None:
        what = kind.name if kind.name.endswith("checkpoint") else f"{kind.name}, not a checkpoint"
        raise CheckpointError(f"{file.path.name}: is {what}. {kind.remedy}.")
    if not file.infos:
        raise CheckpointError(f"{file.path.name}: has no tensors. Download it again, and compare its size with the one on the model's page.")
    raise CheckpointError(
        f"{file.path.name}: matches no known model ({len(file.infos)} tensors, the first is {next(iter(file.infos))}). "
        f"{registry.known_lines()} checkpoints can be loaded. Check that you downloaded the right file."
    )


def _refuse_useless_extra(file: TensorFile, family: Family) -> None:
    if any(component.find(file) for component in (family.vae, *family.text_encoders)):
        return
    kind = checkpoint_identity.identify(file.infos)
    encoders = " or ".join(dict.fromkeys(encoder.title for encoder in family.text_encoders))
    what = f"is {kind.name}. {kind.remedy}" if kind is not None else f"has neither a VAE nor a {encoders} text encoder"
    raise CheckpointError(f"{file.path.name}: was chosen as VAE / Text Encoder, but {what}. Remove it from 'VAE / Text Encoder'.")


def _refuse_misfit(file: TensorFile, family: Family, found: FoundDenoiser) -> None:
    """Refuse a file with a VAE or text encoder that looks right but belongs to another model."""
    if any(component.takes(file, part, found) for component in (family.vae, *family.text_encoders) for part in component.find(file)):
        return
    raise CheckpointError(
        f"{file.path.name}: was chosen as VAE / Text Encoder, but this {family.title} checkpoint uses nothing in it; it belongs to another model. "
        "Remove it from 'VAE / Text Encoder'."
    )


def _find_vae(main: TensorFile, extras: Sequence[TensorFile], family: Family, found: FoundDenoiser) -> _Located | None:
    """The VAE. Later files override earlier ones."""
    for file in [*reversed(extras), main]:
        for part in family.vae.find(file):
            if family.vae.takes(file, part, found):
                return _Located(file=file, part=part)
    return None


def _find_texts(main: TensorFile, extras: Sequence[TensorFile], family: Family, found: FoundDenoiser) -> dict[str, _Located]:
    """The family's text encoders that were found, by name. Later files override earlier ones."""
    taken: dict[str, _Located] = {}
    for file in [main, *extras]:
        for encoder in family.text_encoders:
            for part in encoder.find(file):
                if encoder.takes(file, part, found):
                    taken[encoder.name] = _Located(file=file, part=part)
    return {encoder.name: taken[encoder.name] for encoder in family.text_encoders if encoder.name in taken}


def _check_widths(main: TensorFile, family: Family, texts: Mapping[str, _Located], found: FoundDenoiser) -> None:
    there = [encoder for encoder in family.text_encoders if encoder.name in texts]
    widths = {encoder: encoder.width(texts[encoder.name].file, texts[encoder.name].part) for encoder in there}
    if found.context_width and sum(widths.values()) != found.context_width:
        given = " and ".join(f"{encoder.title} {width} ({texts[encoder.name].file.path.name})" for encoder, width in widths.items())
        raise CheckpointError(
            f"{main.path.name}: its {family.denoiser_title} reads text features {found.context_width} wide, but the text encoders give {given}. "
            "Choose text encoders of the checkpoint's model family, or none."
        )


def _missing_parts_message(
    main: TensorFile, extras: Sequence[TensorFile], family: Family, found: FoundDenoiser, missing: Sequence[Component], *, lacks_vae: bool
) -> str:
    """Lists every missing part with its name, file and folder."""
    needs = [f"{'an' if encoder.title[0] in 'AEIOU' else 'a'} {encoder.title} text encoder" for encoder in missing]
    places = []
    if missing:
        files = [encoder.usual_file or "the text encoder's file" for encoder in missing]
        places.append(f"{_join_names(list(dict.fromkeys(files)))} into models/text_encoder")
    if lacks_vae:
        needs.append("a VAE")
        places.append(f"{family.vae.usual_file or f'an {family.title} VAE'} into models/VAE")
    pick, has = ("choose them", "them") if len(needs) > 1 else ("choose it", "one")
    return (
        f"{main.path.name} needs {_join_names(needs)}: put {_join_names(places)} and {pick} under 'VAE / Text Encoder', or use a checkpoint that has "
        f"{has}.{_misfits_text(main, extras, family, found, missing)}"
    )


def _misfits_text(main: TensorFile, extras: Sequence[TensorFile], family: Family, found: FoundDenoiser, missing: Sequence[Component]) -> str:
    """Describes text encoders that were found but do not fit, with both widths."""
    if not found.context_width:
        return ""
    widths = {
        f"the one in {file.path.name} is {encoder.width(file, part)} wide": None
        for encoder in missing
        for file in (main, *extras)
        for part in encoder.find(file)
        if encoder.width(file, part)
    }
    return f" Its {family.denoiser_title} reads text features {found.context_width} wide; {', '.join(widths)}." if widths else ""


def _join_names(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


# --- building -----------------------------------------------------------------------------------------------------------------------


def _plan_networks(main: TensorFile, extras: Sequence[TensorFile]) -> _Networks:
    """All networks, built without memory, with checked sources: a wrong file costs no memory. Raises: CheckpointError."""
    with refusing_odd_shapes(main, *extras):
        sources = _find_sources(main, extras)
        family, found = sources.family, sources.found
        denoiser, vae = family.build_denoiser(found), family.vae.build(sources.vae.file, sources.vae.part)
        there = [encoder for encoder in family.text_encoders if encoder.name in sources.texts]
        texts = {encoder.name: encoder.build(sources.texts[encoder.name].file, sources.texts[encoder.name].part) for encoder in there}
        key_map = family.key_map(denoiser)
        return _Networks(
            sources=sources,
            key_map=key_map,
            denoiser=denoiser,
            vae=vae,
            texts=texts,
            denoiser_plan=_checked(plan_denoiser(denoiser, main, found.part, key_map.places), sources.denoiser, family.denoiser_title),
            vae_plan=_checked(family.vae.plan(vae, sources.vae.file, sources.vae.part), sources.vae, "VAE"),
            text_plans={encoder.name: _plan_text(encoder, texts[encoder.name], sources.texts[encoder.name]) for encoder in there},
        )


def _build_engine(
    networks: _Networks, main: TensorFile, config: BackendConfig, wanted: _WantedStorage, embedding_dirs: Sequence[Path]
) -> ForgeDiffusionEngine:
    sources, denoiser, vae = networks.sources, networks.denoiser, networks.vae
    family, found = sources.family, sources.found
    clip = _load_clip(networks.texts, networks.text_plans, sources, config)
    latent = family.latent if family.latent_of_vae is None else family.latent_of_vae(vae)
    vae_patcher = _load_vae(vae, networks.vae_plan, sources, config)
    usable, why_not = _usable_storage(sources.denoiser, wanted)
    unet_patcher, prediction = _load_denoiser(denoiser, networks.denoiser_plan, sources, usable, networks.key_map, config)
    parts = EngineParts(
        family=family,
        config=ModelConfig(
            family=family.name,
            unet_config=_config_of(denoiser),
            vae_config=_config_of(vae),
            latent_scale=latent.scale,
            prediction=prediction,
        ),
        unet=unet_patcher,
        clip=clip,
        vae=vae_patcher,
        embeddings=_build_embeddings(clip, family, embedding_dirs),
        filename=main.path,
        native_size_px=_native_size_px(main, family, prediction),
        latent=latent,
        is_inpaint=found.is_inpaint,
        takes_control_picture=found.takes_control_picture,
        metadata=main.metadata,
        storage_notes=_storage_notes(wanted, why_not, denoiser, config),
    )
    return FACES.get(family.name, ForgeDiffusionEngine)(parts)


def _config_of(network: nn.Module) -> dict[str, Any]:
    return dict(getattr(network, "config", {}))


def _plan_text(encoder: Component, network: nn.Module, located: _Located) -> LoadPlan:
    return _checked(encoder.plan(network, located.file, located.part), located, f"{encoder.title} text encoder")


def _checked(plan: LoadPlan, located: _Located, what: str) -> LoadPlan:
    check_plan(plan, located.file, what)
    if plan.unexpected and located.part.prefix:
        logger.debug("%s: %d tensors of its %s are not used (first: %s).", located.file.path.name, len(plan.unexpected), what, plan.unexpected[0])
    return plan


def _count_numbers(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _count_bytes(network: nn.Module, located: _Located, dtype: torch.dtype) -> int:
    """The size of its weights in this dtype, or as the file has them packed."""
    return count_part_bytes(located.file, located.part) if has_packed(located.file, located.part) else _count_numbers(network) * dtype.itemsize


def _load_clip(encoders: Mapping[str, nn.Module], plans: Mapping[str, LoadPlan], sources: _Sources, config: BackendConfig) -> CLIP:
    flag_dtype = dtype_from_flag(config.clip_dtype or config.all_in)
    dtype = flag_dtype or memory_management.text_encoder_dtype()
    device = memory_management.text_encoder_device(sum(_count_bytes(encoder, sources.texts[slot], dtype) for slot, encoder in encoders.items()))
    for slot, encoder in encoders.items():
        located = sources.texts[slot]
        num_parameters = _count_numbers(encoder)
        types = choose_text_encoder_types(matrix_dtypes(located.file, located.part), num_parameters, device, wanted=flag_dtype)
        assign_tensors(
            encoder, plans[slot], located.file, storage_dtype=types.storage_dtype, computation_dtype=types.computation_dtype, keeps_packed=True
        )
        set_types(encoder, types.storage_dtype, types.computation_dtype)
    there = [encoder for encoder in sources.family.text_encoders if encoder.name in encoders]
    tokenizers = {encoder.name: encoder.make_tokenizer() for encoder in there if encoder.make_tokenizer is not None}
    for component in there:
        if component.read_tokenizer is not None:
            located = sources.texts[component.name]
            tokenizers[component.name] = component.read_tokenizer(located.file, located.part)
    return CLIP(encoders, tokenizers)


def _load_vae(vae: nn.Module, plan: LoadPlan, sources: _Sources, config: BackendConfig) -> VAE:
    flag_dtype = dtype_from_flag(config.vae_dtype)
    device = memory_management.vae_device(
        _count_numbers(vae) * (flag_dtype or memory_management.vae_dtype(memory_management.get_torch_device())).itemsize
    )
    dtype = flag_dtype or memory_management.vae_dtype(device)
    assign_tensors(vae, plan, sources.vae.file, storage_dtype=dtype)
    return VAE(vae, device=device, dtype=dtype, latent=sources.family.latent, slot_decoder=decode_on_all_slots)


def _usable_storage(denoiser: _Located, wanted: _WantedStorage) -> tuple[_WantedStorage, str]:
    """What was wanted, or nothing if the file or the device does not allow it; and then why."""
    device = memory_management.get_torch_device()
    if not wanted.is_nothing and has_packed(denoiser.file, denoiser.part):
        return _WantedStorage(), f"{denoiser.file.path.name} is in low bits already"
    if wanted.format is None and wanted.dtype is not None and not memory_management.supports_cast(device, wanted.dtype):
        return _WantedStorage(), f"{device} cannot store weights in {wanted.title}"
    return wanted, ""


def _storage_notes(wanted: _WantedStorage, why_not: str, denoiser: nn.Module, config: BackendConfig) -> tuple[str, ...]:
    """What runs instead of the wanted storage and products, for the log and for jobs."""
    notes = []
    if why_not:
        notes.append(f"Diffusion in Low Bits: {why_not}; the weights are stored in {describe_storage(denoiser)}, not in {wanted.title}.")
    if config.fast_fp8 and not memory_management.multiplies_fp8():
        notes.append("--fast-fp8: not every GPU in use multiplies fp8 numbers (compute capability 8.9 or later); weights are dequantized instead.")
    for note in notes:
        logger.warning("%s", note)
    return tuple(notes)


def _first_place(need_bytes: int, config: BackendConfig) -> torch.device:
    """Where a denoiser's weights lie until the first plan: on the first slot if they fit, unless the plan will cut them over the slots."""
    if config.multi_gpu_strategy == "layers" and len(memory_management.compute_slots()) > 1:
        return memory_management.cpu
    return memory_management.unet_inital_load_device(need_bytes, torch.uint8)


def _load_denoiser(
    denoiser: nn.Module, plan: LoadPlan, sources: _Sources, wanted: _WantedStorage, key_map: KeyMap, config: BackendConfig
) -> tuple[UnetPatcher, PredictionSpec]:
    family, file = sources.family, sources.main
    num_parameters = _count_numbers(denoiser)
    stored = [PACKED] if wanted.format is not None else matrix_dtypes(file, sources.found.part)
    types = choose_denoiser_types(stored, num_parameters, wanted=wanted.dtype, supported=family.compute_dtypes)
    storage_dtype, computation_dtype = types.storage_dtype, types.computation_dtype
    need_bytes = _count_bytes(denoiser, sources.denoiser, storage_dtype)
    if wanted.format is not None:
        need_bytes = int(num_parameters * bits_per_weight(wanted.format) / 8)
    load_device = _first_place(need_bytes, config)
    assign_tensors(
        denoiser, plan, file, storage_dtype=storage_dtype, computation_dtype=computation_dtype, device=load_device, keeps_packed=True,
        packs_as=wanted.format,
    )  # fmt: skip
    prediction = family.find_prediction(file, sources.found, denoiser)
    model = KModel(
        denoiser,
        family.make_predictor(prediction),
        storage_dtype=storage_dtype,
        computation_dtype=computation_dtype,
        build_program=family.build_program,
        key_map=key_map,
        multiplies_fp8=memory_management.multiplies_fp8(),
    )
    patcher = UnetPatcher.from_model(model)
    if family.guidance.rescale is not None:
        patcher.set_guidance_rescale(family.guidance.rescale)
    return patcher, prediction


def _build_embeddings(clip: CLIP, family: Family, folders: Sequence[Path]) -> EmbeddingDatabase:
    slots = [encoder.name for encoder in family.text_encoders if encoder.reads_embeddings]
    widths = {slot: int(cast("Any", clip.cond_stage_model[slot]).config.hidden_size) for slot in slots}
    database = EmbeddingDatabase(clip.tokenizer[slots[0]] if slots else None, widths)
    for folder in folders if slots else ():
        database.add_embedding_dir(folder)
    database.load_textual_inversion_embeddings()
    return database


def _native_size_px(file: TensorFile, family: Family, prediction: PredictionSpec) -> int:
    """The side length the model was trained on, from the file's metadata, else from the family."""
    sides = parse_resolution(file.metadata.get("modelspec.resolution"))
    return sides[0] if sides is not None and sides[0] > 0 else family.native_size_px(prediction)
