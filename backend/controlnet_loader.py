"""Loads a ControlNet file as a link for a chain. The keys determine the kind and the family, never the file's name.

Must not know pages, jobs or lists of files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from diffusers import T2IAdapter as LibraryAdapter
from torch import Tensor

from backend import checkpoint_config, checkpoint_identity
from backend.checkpoint_file import CheckpointError, TensorFile, open_tensor_file
from backend.checkpoint_layout import Part, find_controlnet
from backend.control_dtype import TRANSFORMER_DTYPES, pick_dtype
from backend.control_lora import is_control_lora, read_control_lora
from backend.families.flux.controlnet_files import build_flux_controlnet, find_flux_controlnet, flux_controlnet_key_map
from backend.families.key_map import OriginalPlace
from backend.families.registry import find_family
from backend.families.sd3.controlnet import Sd3ControlNetwork
from backend.families.sd3.controlnet_files import build_sd3_controlnet, find_sd3_controlnet, is_for_canny, sd3_controlnet_places
from backend.families.unet_family import find_unet_family
from backend.families.zimage.controlnet_files import build_zimage_controlnet, find_zimage_controlnet, zimage_controlnet_places
from backend.nn.controlnet import ControlNetwork
from backend.nn.controlnet_union import UnionNetwork
from backend.nn.flux_controlnet import FluxControlNetwork
from backend.nn.t2i_adapter import AdapterNetwork
from backend.patcher.controlnet import ControlBase, ControlNet, T2IAdapter
from backend.patcher.controlnet_union import UnionControlNet
from backend.patcher.flux_controlnet import FluxControlNet
from backend.patcher.latent_controlnet import BorrowingControlNet, HintEncoder
from backend.patcher.sd3_controlnet import Sd3ControlNet, complete_sd3
from backend.patcher.zimage_controlnet import complete_zimage
from backend.state_dict import assign_tensors, build_empty, check_plan, plan_as_named, plan_controlnet, plan_denoiser
from backend.tensor_file import TensorInfo, refusing_odd_shapes

logger = logging.getLogger(__name__)

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
LinkT = TypeVar("LinkT", bound=ControlBase)

_LATENT_CHANNELS = 4
_ADAPTER_STEPS_PX = (8, 16)
"""Side in pixels of the squares that a T2I-Adapter for SD 1.x, for SDXL folds into channels."""
_RESNETS_PER_LEVEL = 2
_UNION_MARK = "task_embedding"
_UNSUPPORTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a ControlLLLite", ("lllite_",)),
    ("half an IP-Adapter", ("ip_adapter.", "image_proj.")),
    (
        "a ControlNet of an unknown kind for a transformer",
        ("controlnet_blocks.", "controlnet_x_embedder.", "transformer_blocks.", "double_blocks.", "joint_blocks."),
    ),
    ("a ControlNet stored as differences from SD 1.5", ("difference",)),
)


class TensorsInMemory:
    """A state dict in memory with the interface of a file of tensors."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.metadata: Mapping[str, str] = {}
        self._tensors = tensors
        self.infos: Mapping[str, TensorInfo] = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}

    def read(self, key: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        """A copy of a tensor, or of some of its rows."""
        stored = self._tensors[key].detach()
        return (stored if rows is None else stored[rows[0] : rows[1]]).to(device=device, dtype=dtype or stored.dtype, copy=True)

    def read_stored(self, key: str, *, device: torch.device | str = "cpu", rows: tuple[int, int] | None = None) -> Tensor:
        """As `read`: nothing in memory is packed."""
        return self.read(key, device=device, rows=rows)

    def close(self) -> None:
        """Release the tensors."""
        self._tensors = {}


def load_controlnet(path: Path) -> ControlBase:
    """The ControlNet in a file. Raises: CheckpointError for another kind of file, or an unsupported kind or family, which the message names."""
    with open_tensor_file(path) as file:
        return build_control(file)


def build_control(file: TensorFile) -> ControlBase:
    """The chain link for a file of tensors. Raises: CheckpointError."""
    with refusing_odd_shapes(file):
        for find, build in _TRANSFORMERS:
            if (transformer := find(file.infos)) is not None:
                return build(file, transformer)
    _refuse_unsupported(file)
    with refusing_odd_shapes(file):
        if is_control_lora(file.infos):
            return read_control_lora(file)
        if find_adapter(file.infos) is not None:
            return _build_adapter(file)
        part = find_controlnet(file.infos)
        if part is None:
            refuse_other_files(file)
        return _build_controlnet(file, part)


def reads_control(keys: Collection[str]) -> bool:
    """Whether these are tensor names of a ControlNet or T2I-Adapter that `build_control` reads tensor by tensor."""
    return any(find(keys) is not None for find in (find_controlnet, find_adapter, *(find for find, _ in _TRANSFORMERS)))


def refuse_other_files(file: TensorFile) -> NoReturn:
    """Explain what a file is that matches no kind of control model. Raises: CheckpointError."""
    _refuse_unsupported(file)
    raise CheckpointError(_unknown_message(file))


def _refuse_unsupported(file: TensorFile) -> None:
    for name, starts in _UNSUPPORTED:
        found = next((key for key in file.infos if key.removeprefix("control_model.").startswith(starts)), None)
        if found is not None:
            raise CheckpointError(
                f"{file.path.name}: is {name} (it has {found}), which is not supported. Use a ControlNet for SD 1.x, SD 2.x, SDXL, "
                "Flux.1, SD 3.x or Z-Image."
            )


def _unknown_message(file: TensorFile) -> str:
    kind = checkpoint_identity.identify(file.infos)
    if kind is not None:
        return f"{file.path.name}: is {kind.name}, not a ControlNet. {kind.remedy}."
    return (
        f"{file.path.name}: is not a supported ControlNet ({len(file.infos)} tensors, the first is {next(iter(file.infos), 'missing')}). "
        "Use a ControlNet for SD 1.x, SD 2.x or SDXL, in the original layout or diffusers'."
    )


def _build_controlnet(file: TensorFile, part: Part) -> ControlNet:
    shape = checkpoint_config.read_controlnet_shape(file, part)
    if shape.in_channels != _LATENT_CHANNELS:
        raise CheckpointError(
            f"{file.path.name}: is a ControlNet for {shape.in_channels} latent channels. Use one for SD 1.x, SD 2.x or SDXL ({_LATENT_CHANNELS})."
        )
    family = find_unet_family(file, shape)
    config = checkpoint_config.controlnet_config(file, part, shape, family)
    is_union = f"{part.prefix}{_UNION_MARK}" in file.infos
    config = checkpoint_config.union_config(file, part, config) if is_union else config
    model = build_empty(lambda: ControlNetUnionModel(**config) if is_union else ControlNetModel(**config))
    plan = plan_controlnet(model, file, part)
    check_plan(plan, file, "ControlNet")
    assign_tensors(model, plan, file, storage_dtype=pick_dtype(model))
    link = UnionControlNet(UnionNetwork(model)) if is_union else ControlNet(ControlNetwork(model), "shuffle" in file.path.stem.lower())
    link.name = file.path.name
    what = f"a ControlNet Union of {link.num_types} kinds" if isinstance(link, UnionControlNet) else "a ControlNet"
    logger.info("Loaded %s: %s for %s, in %s.", file.path.name, what, find_family(family).title, str(link.control_model.dtype)[6:])
    return link


# --- ControlNets of transformers ----------------------------------------------------------------------------------------------------


def _fill(model: ModuleT, file: TensorFile, part: Part, places: Callable[[str], Sequence[OriginalPlace]]) -> ModuleT:
    """The network with the file's tensors."""
    plan = plan_denoiser(model, file, part, places)
    check_plan(plan, file, "ControlNet")
    assign_tensors(model, plan, file, storage_dtype=pick_dtype(model, TRANSFORMER_DTYPES))
    return model


def _named(link: LinkT, file: TensorFile, model: torch.nn.Module, what: str) -> LinkT:
    link.name = file.path.name
    logger.info("Loaded %s: %s, in %s.", file.path.name, what, str(next(model.parameters()).dtype)[6:])
    return link


def _build_flux_controlnet(file: TensorFile, part: Part) -> FluxControlNet:
    model = build_flux_controlnet(file, part)
    _fill(model, file, part, flux_controlnet_key_map(model).places)
    link = FluxControlNet(FluxControlNetwork(model))  # type: ignore[arg-type]  # another network with the same calls
    return _named(link, file, model, f"a ControlNet {f'Union of {link.num_types} kinds ' if link.num_types else ''}for Flux.1")


def _build_sd3_controlnet(file: TensorFile, part: Part) -> HintEncoder:
    model = build_sd3_controlnet(file, part)
    _fill(model, file, part, sd3_controlnet_places(model))
    if model.config.use_pos_embed:
        return _named(Sd3ControlNet(Sd3ControlNetwork(model)), file, model, "a ControlNet for SD 3")  # type: ignore[arg-type]
    is_canny = is_for_canny(file, part)
    link = BorrowingControlNet(complete_sd3(model, file.path.name, is_canny=is_canny))
    return _named(link, file, model, f"a ControlNet for SD3.5 large{', for edges' if is_canny else ''}")


def _build_zimage_controlnet(file: TensorFile, part: Part) -> HintEncoder:
    model = build_zimage_controlnet(file, part)
    _fill(model, file, part, zimage_controlnet_places(model))
    return _named(BorrowingControlNet(complete_zimage(model, file.path.name)), file, model, "a ControlNet Union for Z-Image")


_TRANSFORMERS: tuple[tuple[Callable[[Collection[str]], Part | None], Callable[[TensorFile, Part], HintEncoder]], ...] = (
    (find_flux_controlnet, _build_flux_controlnet),
    (find_sd3_controlnet, _build_sd3_controlnet),
    (find_zimage_controlnet, _build_zimage_controlnet),
)


# --- T2I-Adapters -------------------------------------------------------------------------------------------------------------------


def find_adapter(keys: Collection[str]) -> str | None:
    """The prefix of a T2I-Adapter's layers, or None for another kind of file."""
    for prefix in ("adapter.", ""):
        if any(re.match(rf"{re.escape(prefix)}body\.\d+\.(block1|in_conv|resnets\.\d+\.block1|body\.\d+\.block1)\.weight$", key) for key in keys):
            return prefix
    return None


def _build_adapter(file: TensorFile) -> T2IAdapter:
    prefix = find_adapter(file.infos) or ""
    shapes = {key.removeprefix(prefix): info.shape for key, info in file.infos.items()}
    config, rename = _read_adapter(shapes, file.path.name)
    model = build_empty(lambda: LibraryAdapter(**config))
    plan = plan_as_named(model, file, lambda key: prefix + rename(key.removeprefix("adapter.")))
    check_plan(plan, file, "T2I-Adapter")
    assign_tensors(model, plan, file, storage_dtype=pick_dtype(model))
    link = T2IAdapter(AdapterNetwork(model))
    link.name = file.path.name
    logger.info("Loaded %s: a T2I-Adapter for %s.", file.path.name, "SDXL" if link.t2i_model.is_for_sdxl else "SD 1.x")
    return link


def _read_adapter(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[dict[str, Any], Callable[[str], str]]:
    """(arguments for the library's class, function from its names to stored names). Raises: CheckpointError."""
    is_light = "body.0.out_conv.weight" in shapes
    has_library_names = any(".resnets." in key for key in shapes)
    first = "body.0.in_conv.weight" if is_light else "conv_in.weight"
    if first not in shapes:
        raise CheckpointError(f"{name}: its T2I-Adapter lacks {first}. The file is incomplete; download it again.")
    read = shapes[first][1]
    factor = next((step for step in _ADAPTER_STEPS_PX for channels in (1, 3) if read == channels * step**2), None)
    if factor is None:
        raise CheckpointError(
            f"{name}: is a T2I-Adapter with {read} input channels; those for SD 1.x and SDXL fold squares of 8 or 16 pixels. Use another adapter."
        )
    blocks = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("body."))
    inner = "resnets" if has_library_names else "body"
    if is_light:
        per_level = sum(f"body.0.{inner}.{index}.block1.weight" in shapes for index in range(16))
        widths = [shapes[f"body.{index}.out_conv.weight"][0] for index in range(blocks)]
        config: dict[str, Any] = {"channels": widths[:-1], "adapter_type": "light_adapter"}
    else:
        per_level = sum(f"body.0.resnets.{index}.block1.weight" in shapes for index in range(16)) if has_library_names else _RESNETS_PER_LEVEL
        first_of = "body.{}.resnets.0.block1.weight" if has_library_names else "body.{}.block1.weight"
        step = 1 if has_library_names else per_level
        widths = [shapes[first_of.format(index)][0] for index in range(0, blocks, step)]
        config = {"channels": widths, "adapter_type": "full_adapter_xl" if factor == _ADAPTER_STEPS_PX[1] else "full_adapter"}
    config |= {"in_channels": read // factor**2, "num_res_blocks": per_level, "downscale_factor": factor}

    def rename(key: str) -> str:
        parts = key.split(".")
        if has_library_names or parts[0] != "body":
            return key
        if is_light:
            return key.replace(".resnets.", ".body.")
        level = int(parts[1]) * per_level
        return f"body.{level}.{'.'.join(parts[2:])}" if parts[2] != "resnets" else f"body.{level + int(parts[3])}.{'.'.join(parts[4:])}"

    return config, rename
