"""IP-Adapters for Flux.1 (XLabs): a picture's tokens in additional attentions of the picture's queries, in blocks with two streams.

A file has XLabs' names, or those that diffusers gives it:

ip_adapter_proj_model.proj, .norm    double_blocks.0.processor.ip_adapter_double_stream_k_proj, .. v_proj
image_proj.proj, .norm               ip_adapter.0.to_k_ip, .to_v_ip

Keys and values do not change during a run: they are computed once, kept on the host, and copied to each device that runs part of the network.
Must not know pages, units or folders.

Shapes: B rows, L tokens of the picture that is made, T tokens of the picture that is shown, D token width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection
from torch import Tensor
from torch.nn import functional

from backend.attention import attention_function
from backend.checkpoint_file import CheckpointError, TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.control_dtype import TRANSFORMER_DTYPES, pick_dtype
from backend.families.file_shapes import FileShapes, read_part
from backend.families.flux.program import DOUBLE, SIZES, Sizes
from backend.ip_adapter import AdapterLayers, IPAdapter, Prompting, shown_to_rows
from backend.nn.flux_layers import CELL, picture_queries
from backend.parallel.running.session import find_bound_hook
from backend.patcher.controlnet import ControlNetError
from backend.patcher.unet import UnetPatcher
from backend.tensor_file import refusing_odd_shapes

logger = logging.getLogger(__name__)

TITLE = "an IP-Adapter for Flux.1"
_XLABS = ("ip_adapter_proj_model.", "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj")
_LIBRARY = ("image_proj.", "ip_adapter.{}.to_{}_ip")
_BLOCKS = {_XLABS: "double_blocks.", _LIBRARY: "ip_adapter."}
_INSTANTX_MARKS = ("image_proj.proj.2.weight", "ip_adapter.0.to_k_ip.weight", "ip_adapter.1.to_k_ip.weight")
_DIT = "dit"


def find_flux_ip_adapter(keys: Collection[str]) -> tuple[str, str] | None:
    """The names of an IP-Adapter for Flux.1: the projection's prefix, and the pattern of keys and values. None for other files.

    Those for UNets have no biases.
    """
    for names in (_XLABS, _LIBRARY):
        if f"{names[0]}proj.weight" in keys and f"{names[1].format(0, 'k')}.bias" in keys:
            return names
    return None


def refuse_instantx(file: TensorFile) -> None:
    """Raises: CheckpointError for InstantX's adapter, whose attentions are in all blocks and read SigLIP."""
    if all(mark in file.infos for mark in _INSTANTX_MARKS):
        raise CheckpointError(f"{file.path.name}: is an IP-Adapter for Flux.1 by InstantX, which is not supported. Use one by XLabs, or Redux.")


def read_flux_ip_adapter(file: TensorFile) -> IPAdapter:
    """The adapter in a file. Raises: CheckpointError if it is damaged."""
    names = find_flux_ip_adapter(file.infos)
    assert names is not None
    with refusing_odd_shapes(file):
        shapes = read_part(file, Part("", Layout.DIFFUSERS), TITLE)
        projection, feature_width, context = _build_projection(shapes, names[0])
        count = shapes.count_blocks(_BLOCKS[names])
        weights, biases = ([_read_pair(shapes, names[1], number, end) for number in range(count)] for end in ("weight", "bias"))
        if any(one.shape[-1] != context for pair in weights for one in pair):
            raise shapes.refuse(f"tokens {context} wide and keys that read others")
        layers = AdapterLayers(projection, weights, biases)
    layers.eval().requires_grad_(False).to(pick_dtype(layers, TRANSFORMER_DTYPES))
    adapter = IPAdapter(layers, file.path.name, feature_width)
    logger.info("Loaded %s: %s with %d blocks that reads %s.", adapter.name, TITLE, count, adapter.tower_name)
    return adapter


def _build_projection(shapes: FileShapes, start: str) -> tuple[ImageProjection, int, int]:
    """(the library's module with its weights, its input's width, its tokens' width)."""
    outputs, inputs = shapes.find(f"{start}proj.weight")
    (context,) = shapes.find(f"{start}norm.weight", 1)
    if outputs % context:
        raise shapes.refuse(f"{outputs} outputs of its projection for tokens {context} wide")
    with torch.device("meta"):
        projection = ImageProjection(image_embed_dim=inputs, cross_attention_dim=context, num_image_text_embeds=outputs // context)
    tensors = {}
    for ours, theirs in (("image_embeds", "proj"), ("norm", "norm")):
        for end in ("weight", "bias"):
            shapes.find(f"{start}{theirs}.{end}", 2 if (theirs, end) == ("proj", "weight") else 1)
            tensors[f"{ours}.{end}"] = shapes.file.read(f"{start}{theirs}.{end}", dtype=torch.float32)
    projection.load_state_dict(tensors, assign=True)
    return projection, inputs, context


def _read_pair(shapes: FileShapes, pattern: str, number: int, end: str) -> tuple[Tensor, Tensor]:
    names = [f"{pattern.format(number, what)}.{end}" for what in ("k", "v")]
    for name in names:
        shapes.find(name, 2 if end == "weight" else 1)
    key, value = (shapes.file.read(name, dtype=torch.float32) for name in names)
    return key, value


# in the denoiser

Replacement = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Tensor]]


class FluxPicturePrompts:
    """Stands in a block's place: the block, or its earlier replacement, plus each picture's attention."""

    def __init__(self, prompts: Sequence[Prompting], before: Mapping[tuple[str, int], Replacement]) -> None:
        self.prompts, self.before = tuple(prompts), dict(before)
        self.held: Tensor | None = None

    def __call__(self, args: Mapping[str, Any], extra: Mapping[str, Any]) -> Mapping[str, Tensor]:
        options = args["transformer_options"]
        place, before = tuple(options["block"]), self.before.get(tuple(options["block"]))
        out = dict(extra["original_block"](args) if before is None else before(args, extra))
        active = [one for one in self.prompts if one.is_always_on or one.acts_at(float(options["sigmas"][0]))]
        if active:
            query_BNLK = picture_queries(extra["block"], args["img"], args["vec"])
            for prompt in active:
                out["img"] = out["img"] + self._shown(prompt, place, query_BNLK, options).to(out["img"].dtype)
        return out

    def _shown(self, prompt: Prompting, place: tuple[str, int], query_BNLK: Tensor, options: Mapping[str, Any]) -> Tensor:
        num_rows, heads, num_tokens, _ = query_BNLK.shape
        pair = prompt.pair_on(place, query_BNLK.device)
        kinds = shown_to_rows(dict(options), num_rows, pair[0].shape[0] - 1)
        key_BNTK, value_BNTK = (one[kinds].reshape(num_rows, one.shape[1], heads, -1).transpose(1, 2).to(query_BNLK) for one in pair)
        shown_BLD = attention_function(query_BNLK, key_BNTK, value_BNTK, heads, skip_reshape=True) * prompt.weight
        if prompt.mask_B1HW is None:
            return shown_BLD
        return shown_BLD * _mask_of_tokens(prompt.mask_B1HW, options[SIZES], num_tokens).to(shown_BLD)


def _mask_of_tokens(mask_B1HW: Tensor, sizes: Sizes, num_tokens: int) -> Tensor:
    """The mask over the picture's tokens, (1, L, 1); zero for those of references."""
    cells = (-(-sizes.height // CELL), -(-sizes.width // CELL))
    mask_1L1 = functional.interpolate(mask_B1HW.float(), size=cells, mode="area").flatten(2).transpose(1, 2)[:1]
    return functional.pad(mask_1L1, (0, 0, 0, num_tokens - mask_1L1.shape[1]))


def apply_flux_ip_adapter(
    unet: UnetPatcher,
    adapter: IPAdapter,
    features: Tensor,
    *,
    weight: float = 1.0,
    percent_range: tuple[float, float] = (0.0, 1.0),
    mask_B1HW: Tensor | None = None,
) -> UnetPatcher:
    """A clone of `unet` that also attends to a picture. `features` (1 + I, P): those of a black picture, then of the pictures.

    Raises: ControlNetError for an adapter of another family or width.
    """
    theirs: Any = getattr(unet.model.diffusion_model, "config", {})
    if "num_single_layers" not in theirs or "pooled_projection_dim" not in theirs:
        raise ControlNetError(f"{adapter.name} is {TITLE}, but the checkpoint in use is not. Choose one of the checkpoint's family.")
    own, width = len(adapter.layers.to_k), adapter.layers.to_k[0].out_features
    inner = theirs.num_attention_heads * theirs.attention_head_dim
    if (own, width) != (theirs.num_layers, inner):
        raise ControlNetError(
            f"{adapter.name} does not fit the checkpoint in use: it is for {own} blocks {width} wide, and the checkpoint has {theirs.num_layers} of "
            f"{inner}. Choose an IP-Adapter that was made for this model."
        )
    pairs = adapter.make_keys_and_values(features, unet.model.computation_dtype)
    end, start = (unet.model.predictor.percent_to_sigma(percent) for percent in reversed(percent_range))
    mask = None if mask_B1HW is None else mask_B1HW.to("cpu")
    prompt = Prompting({(DOUBLE, number): pair for number, pair in enumerate(pairs)}, weight=weight, sigma_range=(end, start), mask_B1HW=mask)
    return _put_in(unet, prompt, own)


def _put_in(unet: UnetPatcher, prompt: Prompting, num_blocks: int) -> UnetPatcher:
    patched = unet.clone()
    replacements = patched.model_options["transformer_options"].get("patches_replace", {}).get(_DIT, {})
    before = next((hook for hook in replacements.values() if isinstance(hook, FluxPicturePrompts)), None)
    others = {place: hook for place, hook in replacements.items() if not isinstance(hook, FluxPicturePrompts)}
    hook = FluxPicturePrompts([*(before.prompts if before else ()), prompt], {**(before.before if before else {}), **others})
    if find_bound_hook({"patches_replace": {_DIT: hook.before}}) is not None:
        hook.held = torch.empty(0)  # a hook that calls a bound hook is bound too
    for number in range(num_blocks):
        patched.set_model_patch_replace(hook, _DIT, DOUBLE, number)
    return patched
