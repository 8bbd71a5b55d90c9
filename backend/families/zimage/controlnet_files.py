"""ControlNet Unions for Z-Image in files, with the names of diffusers or of the denoiser's original files.

control_all_x_embedder.2-1, control_layers.0.before_proj, control_layers.0.attention.to_q (or .qkv), control_noise_refiner.0 ..

Three kinds. The first refines the control tokens alone. 2.0 (with mask and picture behind the hint's latents) also passes them through its layers
next to the denoiser's refiners; 2.1 has refiners of its own for that. Reads names, shapes, and one matrix that is zero in 2.0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from diffusers import ZImageControlNetModel

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.families.file_shapes import FileShapes, read_part
from backend.families.flux.key_map import share_rows
from backend.families.key_map import KeyMap, OriginalPlace
from backend.families.zimage.controlnet import INPAINT_CHANNELS
from backend.families.zimage.identify import CELL, LATENT_CHANNELS
from backend.families.zimage.key_map import ATTENTION, QKV
from backend.state_dict import build_empty

TITLE = "a ControlNet for Z-Image"
_PREFIXES = ("", "controlnet.", "control_model.", "model.diffusion_model.")
_EMBEDDER, _FIRST = "control_all_x_embedder.2-1.weight", "control_layers.0.after_proj.weight"
_NORMS = {Layout.DIFFUSERS: "control_layers.0.attention.norm_q.weight", Layout.LDM: "control_layers.0.attention.q_norm.weight"}
_OWN_START = "control_noise_refiner.0.before_proj.weight"


def find_zimage_controlnet(keys: Collection[str]) -> Part | None:
    """A ControlNet for Z-Image; None for other files."""
    for prefix in _PREFIXES:
        if prefix + _EMBEDDER in keys and prefix + _FIRST in keys:
            for layout, norm in _NORMS.items():
                if prefix + norm in keys:
                    return Part(prefix, layout)
    return None


def build_zimage_controlnet(file: TensorFile, part: Part) -> ZImageControlNetModel:
    """The network without weights. Its layers' places are not known before the denoiser is: they are numbered.

    Raises: CheckpointError for one that lacks layers, or has inputs of an unknown kind.
    """
    shapes = read_part(file, part, TITLE)
    width, inputs = shapes.find(_EMBEDDER)
    (head_width,) = shapes.find(_NORMS[part.layout], 1)
    channels, rest = divmod(inputs, CELL**2)
    if rest or channels not in (LATENT_CHANNELS, INPAINT_CHANNELS) or head_width < 8 or width % head_width:
        raise shapes.refuse(f"{inputs} inputs per token of the hint and heads {head_width} of {width} wide")
    num_refiners = shapes.count_blocks("control_noise_refiner.")
    kind = None if channels == LATENT_CHANNELS else _refiner_kind(file, shapes)
    config: dict[str, Any] = {
        "control_layers_places": list(range(shapes.count_blocks("control_layers."))),
        "control_refiner_layers_places": None if kind is None else list(range(num_refiners or 2)),
        "control_in_dim": channels,
        "add_control_noise_refiner": kind,
        "dim": width,
        "n_refiner_layers": num_refiners or 2,
        "n_heads": width // head_width,
        "n_kv_heads": width // head_width,
    }
    return build_empty(lambda: ZImageControlNetModel(**config))


def _refiner_kind(file: TensorFile, shapes: FileShapes) -> str:
    has_own = _OWN_START in shapes and bool(file.read(shapes.part.prefix + _OWN_START).any())
    return "control_noise_refiner" if has_own else "control_layers"


def zimage_controlnet_places(network: ZImageControlNetModel) -> Callable[[str], Sequence[OriginalPlace]]:
    """Function from our names to places in files with the denoiser's original names."""
    modules: dict[str, str] = {}
    rows = {}
    for kind in ("control_layers", "control_noise_refiner"):
        for number in range(len(getattr(network, kind) or ())):
            attention = f"{kind}.{number}.attention"
            modules.update({f"{attention}.{name}": f"{attention}.{other}" for name, other in ATTENTION.items()})
            parts = share_rows([f"{attention}.{name}" for name in QKV], [network.config.dim] * 3)
            rows.update(parts)
            modules.update(dict.fromkeys(parts, f"{attention}.qkv"))
    return KeyMap(modules=modules, rows=rows).places
