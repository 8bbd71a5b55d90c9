"""Fills a network built without memory from a file: finds each parameter's stored tensor, checks them all, then reads them one by one.

Knows key layouts and shapes; callers supply families and configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from backend import key_layout
from backend.checkpoint_file import CheckpointError, TensorFile, open_tensor_file
from backend.checkpoint_layout import Layout, Part
from backend.storage.choices import quantize_as
from backend.storage.kinds import storage_of
from backend.storage.packed import PackedTensor, can_cut, empty_packed, reshape_packed
from backend.storage.running import is_cast_layer

ModuleT = TypeVar("ModuleT", bound=nn.Module)
SharedRows = tuple[int, int, int, bool]
"""(first row, end row, total rows, whether the file stores the second half of these rows first)."""
PlacesOf = Callable[[str], Sequence[tuple[str, SharedRows | None]]]

_QKV_THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_INNER_CONVS = {"quant_conv.": "encoder.", "post_quant_conv.": "decoder."}
"""Convolutions around a VAE's latents, and where Flux.2's original file has them."""
_IGNORED_ENDINGS = ("position_ids", "logit_scale", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSource:
    """The stored tensor of one parameter. `third`: which third of its rows (fused q, k, v); `rows`: rows of a shared matrix;
    `transposed`: rows and columns swapped."""

    key: str
    third: int | None = None
    rows: SharedRows | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """All parameters of a network with their sources. `missing` and `unexpected` are keys in the file's spelling."""

    sources: Mapping[str, TensorSource]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]


def build_empty(make: Callable[[], ModuleT]) -> ModuleT:
    """The network that `make` builds, with parameters on the meta device (no memory), in eval mode and without gradients.

    Raises: ValueError for widths whose product is no number of bytes.
    """
    try:
        with torch.device("meta"):
            module = make()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    module.eval().requires_grad_(False)
    return module


def plan_denoiser(denoiser: nn.Module, file: TensorFile, part: Part, places_of: PlacesOf) -> LoadPlan:
    """Sources of a denoiser's parameters. `places_of` returns each one's original names (the usual one first) with its rows of the matrix.

    In diffusers' layout a parameter has our name, or its original one if both layouts share that.
    """
    if part.layout is Layout.DIFFUSERS:
        return _plan(denoiser, file, part, lambda key: [TensorSource(key=part.prefix + name) for name in (key, *_whole_names(places_of(key)))])
    return _plan(denoiser, file, part, lambda key: [TensorSource(key=part.prefix + name, rows=rows) for name, rows in places_of(key)])


def _whole_names(places: Sequence[tuple[str, SharedRows | None]]) -> list[str]:
    return [name for name, rows in places if rows is None]


def plan_controlnet(controlnet: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of a ControlNetModel's parameters."""
    if part.layout is Layout.DIFFUSERS:
        return _plan(controlnet, file, part, lambda key: [TensorSource(key=part.prefix + key)])
    names = key_layout.controlnet_module_names(cast("Mapping[str, Any]", controlnet.config))
    return _plan(controlnet, file, part, lambda key: [TensorSource(key=part.prefix + key_layout.rename_by_module(key, names))])


def plan_as_named(network: nn.Module, file: TensorFile, rename: Callable[[str], str]) -> LoadPlan:
    """Sources of a network's parameters, whose stored names `rename` returns."""
    return _plan(network, file, Part("", Layout.DIFFUSERS), lambda key: [TensorSource(key=rename(key))])


def plan_vae(vae: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of an AutoencoderKL's parameters, in the original layout, diffusers' layout, or diffusers' older layout with other attention names."""
    num_levels = len(cast("Mapping[str, Any]", vae.config)["up_block_types"])

    def candidates(key: str) -> list[TensorSource]:
        inner = [TensorSource(key=part.prefix + half + key) for conv, half in _INNER_CONVS.items() if key.startswith(conv)]
        if part.layout is Layout.LDM:
            return [TensorSource(key=part.prefix + key_layout.vae_key_to_ldm(key, num_levels)), *inner]
        return [TensorSource(key=part.prefix + key), TensorSource(key=part.prefix + _old_vae_name(key)), *inner]

    return _plan(vae, file, part, candidates)


def _old_vae_name(key: str) -> str:
    for new, old in key_layout.OLD_VAE_ATTENTION_CHILDREN.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key


def plan_text_encoder(encoder: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    """Sources of a CLIP text encoder's parameters, in transformers' layout (with or without `text_model.`) or OpenCLIP's."""
    find = _open_clip_sources if part.layout is Layout.OPEN_CLIP else _transformers_sources
    return _plan(encoder, file, part, lambda key: find(part.prefix, key.removeprefix("text_model.")))


def _transformers_sources(prefix: str, key: str) -> list[TensorSource]:
    return [TensorSource(key=f"{prefix}text_model.{key}"), TensorSource(key=prefix + key)]


def _open_clip_sources(prefix: str, key: str) -> list[TensorSource]:
    name = key_layout.open_clip_key(key)
    if ".in_proj_" in name:
        part = key.split(".")[-2]
        return [TensorSource(key=prefix + name, third=_QKV_THIRDS[part])]
    if name == "text_projection":
        return [TensorSource(key=prefix + name, transposed=True), TensorSource(key=f"{prefix}text_projection.weight")]
    return [TensorSource(key=prefix + name), TensorSource(key=f"{prefix}{name}.weight")]


def _plan(module: nn.Module, file: TensorFile, part: Part, candidates: Callable[[str], list[TensorSource]]) -> LoadPlan:
    sources: dict[str, TensorSource] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for name, target in module.state_dict().items():
        choices = candidates(name)
        source = next((choice for choice in choices if choice.key in file.infos), None)
        if source is None:
            missing.append(choices[0].key)
            continue
        sources[name] = source
        stored_shape = file.infos[source.key].shape
        if not _fits(stored_shape, tuple(target.shape), source):
            misshapen.append(f"{source.key} is {_shape_text(stored_shape)}, {_shape_text(tuple(target.shape))} is needed")
    unexpected = _unexpected(file.infos, part, {source.key for source in sources.values()})
    return LoadPlan(sources=sources, missing=tuple(missing), unexpected=unexpected, misshapen=tuple(misshapen))


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...], source: TensorSource) -> bool:
    if source.rows is not None:
        first, end, total, _ = source.rows
        return stored == (total, *wanted[1:]) and end - first == wanted[0]
    if source.third is not None:
        return len(stored) == len(wanted) and stored == (3 * wanted[0], *wanted[1:])
    if source.transposed:
        return stored == wanted[::-1]
    if len(stored) == 1 < len(wanted):
        return stored[0] == math.prod(wanted)  # a table whose rows are stored as one
    return _without_tail_ones(stored) == _without_tail_ones(wanted)  # a 1x1 convolution may be stored as a matrix, and vice versa


def _without_tail_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _unexpected(keys: Iterable[str], part: Part, used: Collection[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if key.startswith(part.prefix) and key not in used and not key.endswith(_IGNORED_ENDINGS))


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape) or "a single number"


def check_plan(plan: LoadPlan, file: TensorFile, what: str) -> None:
    """Raises: CheckpointError if parameters have no source or one with another shape; the message has their count and the first one."""
    if plan.missing:
        raise CheckpointError(
            f"{file.path.name}: its {what} lacks {len(plan.missing)} of {len(plan.missing) + len(plan.sources)} tensors (first: {plan.missing[0]}). "
            "The file is incomplete: download it again, or convert it again from its source."
        )
    if plan.misshapen:
        raise CheckpointError(
            f"{file.path.name}: {len(plan.misshapen)} tensors of its {what} have shapes that do not fit together (first: {plan.misshapen[0]}). "
            "The file is damaged, or a mix of two models; use another file."
        )


def matrix_dtypes(file: TensorFile, part: Part) -> list[torch.dtype]:
    """Stored dtypes of a part's matrices and kernels, one entry each; uint8 for packed ones."""
    return [info.dtype for key, info in file.infos.items() if key.startswith(part.prefix) and len(info.shape) > 1]


def count_part_bytes(file: TensorFile, part: Part) -> int:
    """Bytes of a part's tensors in the file."""
    return sum(info.stored_bytes for key, info in file.infos.items() if key.startswith(part.prefix))


def has_packed(file: TensorFile, part: Part) -> bool:
    """Whether the file has weights of the part packed."""
    return any(info.packed is not None for key, info in file.infos.items() if key.startswith(part.prefix))


def assign_tensors(
    module: nn.Module,
    plan: LoadPlan,
    file: TensorFile,
    *,
    storage_dtype: torch.dtype,
    computation_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keeps_packed: bool = False,
    packs_as: str | None = None,
) -> None:
    """Give every parameter of an empty network its stored tensor on `device`, one at a time, so that nothing is in memory twice.

    Weights of linear, convolution and embedding layers get `storage_dtype`, or stay packed if the file has them packed and `keeps_packed` is set.
    Norms, which are never stored compactly, get `computation_dtype` if it is given. `packs_as`: a format (`storage.choices`) for the linear layers'
    plain matrices, which are quantized on `device`.
    """
    for name, target in list(module.state_dict().items()):
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        source, shape = plan.sources[name], tuple(target.shape)
        if keeps_packed and _stays_packed(owner, leaf, file, source):
            tensor = _read_packed(file, source, shape, device)
        else:
            dtype = storage_dtype if is_cast_layer(owner) else computation_dtype or storage_dtype
            is_matrix = packs_as is not None and leaf == "weight" and isinstance(owner, nn.Linear)
            tensor = _materialize(file, source, shape, torch.float32 if is_matrix else dtype, device)
            if packs_as is not None and is_matrix:
                packed = quantize_as(packs_as, tensor)
                tensor = tensor.to(dtype) if packed is None else packed
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    _fill_buffers(module, device)


def assign_formats(module: nn.Module, plan: LoadPlan, file: TensorFile) -> None:
    """Give the weights of an empty network that `assign_tensors` would keep packed their formats, without numbers, so that their bytes count."""
    for name, target in list(module.state_dict().items()):
        owner_name, _, leaf = name.rpartition(".")
        owner, source = module.get_submodule(owner_name), plan.sources[name]
        form = file.infos[source.key].packed
        if form is not None and _stays_packed(owner, leaf, file, source):
            rows = _rows_of(source, tuple(target.shape))
            cut = form if rows is None else form.cut(*rows)
            setattr(owner, leaf, nn.Parameter(empty_packed(cut.reshaped(tuple(target.shape))), requires_grad=False))


def _stays_packed(owner: nn.Module, leaf: str, file: TensorFile, source: TensorSource) -> bool:
    """Whether a layer can take the weight as the file packs it: not if its rows cannot be cut out, or it is stored transposed."""
    form = file.infos[source.key].packed
    if form is None or leaf != "weight" or not is_cast_layer(owner) or source.transposed:
        return False
    if source.rows is None and source.third is None:
        return True
    first, end = _rows_of(source, owner.weight.shape)  # type: ignore[misc, arg-type]
    middle = (first + end) // 2
    return can_cut(form, first, end) and (source.rows is None or not source.rows[3] or can_cut(form, first, middle))


def _rows_of(source: TensorSource, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows of the stored matrix that are the parameter's; None for all."""
    if source.third is not None:
        return source.third * shape[0], (source.third + 1) * shape[0]
    return None if source.rows is None else source.rows[:2]


def _read_packed(file: TensorFile, source: TensorSource, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    tensor = file.read_stored(source.key, device=device, rows=_rows_of(source, shape))
    if source.rows is not None and source.rows[3]:
        storage, middle = storage_of(tensor), tensor.shape[0] // 2
        tensor = type(storage).concat([storage.rows(middle, tensor.shape[0]), storage.rows(0, middle)]).tensor
    assert isinstance(tensor, PackedTensor)
    return reshape_packed(tensor, shape)


def _materialize(file: TensorFile, source: TensorSource, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    tensor = file.read(source.key, dtype=dtype, device=device, rows=_rows_of(source, shape))
    if source.rows is not None and source.rows[3]:
        tensor = torch.cat([*reversed(tensor.chunk(2))])
    if source.transposed:
        tensor = tensor.T.contiguous()
    return tensor.reshape(shape)


def _fill_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Create the buffers that no file contains. These networks have only one kind, CLIP's position numbers."""
    for name, buffer in list(_meta_buffers(module)):
        owner_name, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise RuntimeError(f"Buffer {name} of {type(module).__name__} was built without memory; _fill_buffers must fill it.")
        positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        module.get_submodule(owner_name).register_buffer(leaf, positions, persistent=False)


def _meta_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in module.named_buffers() if buffer.is_meta)


def read_state_dict(path: Path, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a small file (LoRA, embedding, upscaler) in host memory, read as safely as a checkpoint's.

    Raises: CheckpointError for a file that cannot be read.
    """
    with open_tensor_file(path) as file:
        return {key: file.read(key, dtype=dtype) for key in file.infos}
