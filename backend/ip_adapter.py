"""IP-Adapters (Ye et al. 2023, "IP-Adapter"): a picture's tokens in additional cross-attentions next to the text's.

Diffusers defines the file's layout and the networks that make tokens; in the denoiser, an adapter replaces attn2. A picture's keys and values do
not change during a run: they are computed once, kept on the host, and copied to each device that runs part of the network.
Must not know pages, units or folders.

Shapes: B rows, L tokens of the latents, T tokens of the picture, D token width.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import interpolate

from backend import memory_management
from backend.attention import attention_function
from backend.checkpoint_file import CheckpointError, TensorFile
from backend.control_dtype import pick_dtype
from backend.modules.k_prediction import NEARLY_PURE_NOISE_SIGMA
from backend.nn.unet_tiles import TILE_ROWS
from backend.parallel.running.session import find_bound_hook
from backend.patcher.base import ModelPatcher
from backend.patcher.controlnet import ControlNetError, family_of
from backend.patcher.unet import UnetPatcher
from backend.tensor_file import refusing_odd_shapes

logger = logging.getLogger(__name__)

_PROJECTION, _ATTENTION = "image_proj.", "ip_adapter."
_FACE_WIDTH = 512
"""Width of InsightFace's embeddings: adapters that read it are for faces."""
_TOWERS = {1024: "CLIP-ViT-H", 1280: "CLIP-ViT-bigG", 768: "CLIP-ViT-L"}
_TOWERS_BY_WIDTH = {1280: "CLIP-ViT-H", 1664: "CLIP-ViT-bigG", 1024: "CLIP-ViT-L"}
Place = tuple[Any, ...]
"""(kind of block, its number, transformer block)."""


def is_ip_adapter(keys: Collection[str]) -> bool:
    """Whether these are tensor names of an IP-Adapter."""
    return any(key.startswith(_PROJECTION) for key in keys) and any(key.startswith(_ATTENTION) for key in keys)


class AdapterLayers(nn.Module):
    """The layers that turn a picture's features into tokens, and tokens into keys and values, in the order of the file's numbers.

    `pairs`: weights of keys and values; `biases`, if there are any, in the same order.
    """

    def __init__(self, image_proj: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]], biases: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__()
        self.image_proj = image_proj
        both: Sequence[tuple[Tensor | None, Tensor | None]] = biases or [(None, None)] * len(pairs)
        self.to_k, self.to_v = (
            nn.ModuleList([_as_linear(pair[index], bias[index]) for pair, bias in zip(pairs, both, strict=True)]) for index in (0, 1)
        )

    @torch.inference_mode()
    def forward(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (rows, T, D) of every cross-attention for features (rows, P) or (rows, L, P)."""
        tokens = self.image_proj(features)
        return [(to_k(tokens), to_v(tokens)) for to_k, to_v in zip(self.to_k, self.to_v, strict=True)]


def _as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class IPAdapter:
    """An adapter's network with its patcher for memory management. `feature_width`: the width it reads from the picture tower."""

    def __init__(self, layers: AdapterLayers, name: str, feature_width: int) -> None:
        self.layers, self.name, self.feature_width = layers, name, feature_width
        self.patcher = ModelPatcher(
            layers, load_device=memory_management.get_torch_device(), offload_device=torch.device("cpu"), current_device=torch.device("cpu")
        )

    @property
    def reads_hidden_states(self) -> bool:
        """Whether it reads all tokens of the tower's second to last layer, not the projection."""
        return not isinstance(self.layers.image_proj, ImageProjection)

    @property
    def tower_name(self) -> str:
        """The common name of the picture tower it was made for."""
        names = _TOWERS_BY_WIDTH if self.reads_hidden_states else _TOWERS
        return names.get(self.feature_width, f"a CLIP vision model {self.feature_width} wide")

    def make_keys_and_values(self, features: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values on the host, for the features of an empty picture and of the picture."""
        memory_management.load_models_gpu([self.patcher])
        own = next(self.layers.parameters()).dtype
        return [(key.to("cpu", dtype), value.to("cpu", dtype)) for key, value in self.layers(features.to(self.patcher.load_device, own))]


def read_ip_adapter(file: TensorFile) -> IPAdapter:
    """The adapter in a file. Raises: CheckpointError if it is damaged, or made for faces."""
    with refusing_odd_shapes(file):
        return _read(file)


def _read(file: TensorFile) -> IPAdapter:
    _refuse_faces(file)
    projection = {key.removeprefix(_PROJECTION): file.read(key, dtype=torch.float32) for key in file.infos if key.startswith(_PROJECTION)}
    numbers = sorted({int(key.split(".")[1]) for key in file.infos if key.startswith(_ATTENTION)})
    wanted = [f"{_ATTENTION}{number}.to_{what}_ip.weight" for number in numbers for what in ("k", "v")]
    missing = [key for key in wanted if key not in file.infos]
    if missing:
        raise CheckpointError(f"{file.path.name}: is an IP-Adapter without {len(missing)} of its tensors (first: {missing[0]}); download it again.")
    image_proj = _build_projection(file, projection)
    pairs = [tuple(file.read(key, dtype=torch.float32) for key in wanted[index : index + 2]) for index in range(0, len(wanted), 2)]
    layers = AdapterLayers(image_proj, [(key, value) for key, value in pairs])
    layers.eval().requires_grad_(False).to(pick_dtype(layers))
    adapter = IPAdapter(layers, file.path.name, _feature_width(projection))
    logger.info("Loaded %s: an IP-Adapter for %d cross-attentions that reads %s.", adapter.name, len(numbers), adapter.tower_name)
    return adapter


def _build_projection(file: TensorFile, projection: dict[str, Tensor]) -> nn.Module:
    """The library's module with these weights. Built without memory first, which shows whether they fit: sizes come from several tensors, and their
    product may be larger than any memory. Raises: CheckpointError."""
    build = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # nothing is copied into a module without memory
            build(dict(projection), low_cpu_mem_usage=False)
        return cast("nn.Module", build(projection, low_cpu_mem_usage=False))
    except (KeyError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{file.path.name}: the image projection of this IP-Adapter is of an unsupported kind ({error}). Choose another file."
        ) from error


def _feature_width(projection: Mapping[str, Tensor]) -> int:
    return next(projection[name].shape[-1] for name in ("proj.weight", "proj.0.weight", "proj_in.weight") if name in projection)


def _refuse_faces(file: TensorFile) -> None:
    is_face = any("perceiver_resampler" in key or "_lora." in key or (key == "image_proj.norm.weight" and "image_proj.proj.0.weight" in file.infos)
                  for key in file.infos)  # fmt: skip
    inputs = [file.infos[key].shape[-1] for key in ("image_proj.proj_in.weight", "image_proj.proj.0.weight") if key in file.infos]
    if is_face or _FACE_WIDTH in inputs:
        raise CheckpointError(
            f"{file.path.name}: is an adapter for faces (FaceID or InstantID), which reads InsightFace embeddings. This is not supported. Use an "
            "IP-Adapter that reads CLIP: plain, light, plus, plus-face or full-face."
        )


# in the denoiser


@dataclass(eq=False)
class Prompting:
    """Keys and values by place of one picture for all rows, or one per picture of the batch (empty picture first), with the unit's settings.

    `mask_B1HW` limits it to a region."""

    pairs: Mapping[Place, tuple[Tensor, Tensor]]
    weight: float = 1.0
    sigma_range: tuple[float, float] = (0.0, float("inf"))
    mask_B1HW: Tensor | None = None
    _on: dict[tuple[str, Place], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_always_on(self) -> bool:
        """Whether it is active at every noise level. Then the level need not be read, which would wait for the device."""
        return self.weight != 0.0 and self.sigma_range[0] <= 0.0 and self.sigma_range[1] >= NEARLY_PURE_NOISE_SIGMA

    def acts_at(self, sigma: float) -> bool:
        return self.weight != 0.0 and self.sigma_range[0] <= sigma <= self.sigma_range[1]

    def pair_on(self, place: Place, device: torch.device) -> tuple[Tensor, Tensor]:
        """A place's keys and values, copied once to each device."""
        with self._lock:
            found = self._on.get((str(device), place))
            if found is None:
                key, value = self.pairs[place]
                found = self._on[str(device), place] = key.to(device), value.to(device)
        return found


class PicturePrompts:
    """Replaces attn2: the text's attention, or its earlier replacement, plus each picture's attention."""

    @property
    def works_on_tiles(self) -> bool:
        """Tokens are independent of each other here, unless a replacement by others is called."""
        return all(getattr(hook, "works_on_tiles", False) for hook in self.before.values())

    def __init__(self, prompts: Sequence[Prompting], before: Mapping[Place, Callable[..., Tensor]]) -> None:
        self.prompts, self.before = tuple(prompts), dict(before)
        self.held: Tensor | None = None

    def __call__(self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, extra: dict[str, Any]) -> Tensor:
        place, heads = (*extra["block"], extra["block_index"]), extra["n_heads"]
        replaced = self.before.get(place) or self.before.get(tuple(extra["block"]))
        result_BLD = attention_function(q_BLD, k_BLD, v_BLD, heads) if replaced is None else replaced(q_BLD, k_BLD, v_BLD, extra)
        for prompt in self.prompts:
            if prompt.is_always_on or prompt.acts_at(float(extra["sigmas"][0])):
                key_2TD, value_2TD = prompt.pair_on(place, q_BLD.device)
                kinds = shown_to_rows(extra, q_BLD.shape[0], key_2TD.shape[0] - 1)
                shown_BLD = attention_function(q_BLD, key_2TD[kinds], value_2TD[kinds], heads)
                if prompt.mask_B1HW is not None:
                    shown_BLD = shown_BLD * _mask_of_tokens(prompt.mask_B1HW, q_BLD, extra["original_shape"], extra.get(TILE_ROWS))
                result_BLD = result_BLD + prompt.weight * shown_BLD
        return result_BLD


def shown_to_rows(extra: dict[str, Any], num_rows: int, num_pictures: int) -> list[int]:
    """For each row the index of its picture: 0 (the empty picture) in the negative branch, else 1 + the row's position in the batch."""
    places: Sequence[int] = extra.get("picture_indices") or [0] * num_rows
    return [0 if row in extra["uncond_indices"] else 1 + places[row] % num_pictures for row in range(num_rows)]


def _mask_of_tokens(mask_B1HW: Tensor, q_BLD: Tensor, original_shape: Sequence[int], tile_rows: tuple[int, int, int] | None) -> Tensor:
    """The mask in the size of a level, (1, L, 1); of a tile, that part of it. `tile_rows`: first row, end and rows of the whole at that level."""
    if tile_rows is not None:
        start, end, height = tile_rows
        whole_B1HW = interpolate(mask_B1HW.to(q_BLD), size=(height, q_BLD.shape[1] // (end - start)), mode="area")
        return whole_B1HW[:, :, start:end].flatten(2).transpose(1, 2)[:1]
    height, width = original_shape[-2:]
    while height * width > q_BLD.shape[1]:
        height, width = -(-height // 2), -(-width // 2)
    return interpolate(mask_B1HW.to(q_BLD), size=(height, width), mode="area").flatten(2).transpose(1, 2)[:1]


def cross_attention_places(unet: UnetPatcher) -> list[tuple[Place, Any]]:
    """The cross-attentions with their places, in the order of IP-Adapter files: input blocks, output blocks, middle block."""
    segments = sorted(unet.model.program.segments, key=lambda segment: ("input", "output", "middle", "last").index(segment.kind))
    found = []
    for segment in segments:
        for layer in segment.layers:
            if isinstance(layer, Transformer2DModel):
                blocks: Any = layer.get_submodule("transformer_blocks")
                found += [((*segment.key, index), block.attn2) for index, block in enumerate(blocks)]
    return found


def apply_ip_adapter(
    unet: UnetPatcher,
    adapter: IPAdapter,
    features: Tensor,
    *,
    weight: float = 1.0,
    percent_range: tuple[float, float] = (0.0, 1.0),
    mask_B1HW: Tensor | None = None,
) -> UnetPatcher:
    """A clone of `unet` that also attends to a picture (features: empty picture first). Raises: ControlNetError for an adapter of another family."""
    places = cross_attention_places(unet)
    own = [(linear.out_features, linear.in_features) for linear in adapter.layers.to_k]
    theirs = [(attention.to_k.out_features, attention.to_k.in_features) for _, attention in places]
    if own != theirs:
        raise ControlNetError(
            f"{adapter.name} does not fit the checkpoint in use: it is an IP-Adapter for {len(own)} cross-attentions over text {own[0][1]} wide, but "
            f"the checkpoint is {family_of(unet.model.diffusion_model.config)} with {len(theirs)} over text {theirs[0][1]} wide. "
            "Choose one of the checkpoint's family."
        )
    pairs = adapter.make_keys_and_values(features, unet.model.computation_dtype)
    end, start = (unet.model.predictor.percent_to_sigma(percent) for percent in reversed(percent_range))
    mask = None if mask_B1HW is None else mask_B1HW.to("cpu")
    prompt = Prompting(dict(zip([place for place, _ in places], pairs)), weight=weight, sigma_range=(end, start), mask_B1HW=mask)
    return _put_in(unet, prompt, {(place[0], place[1]) for place, _ in places})


def _put_in(unet: UnetPatcher, prompt: Prompting, blocks: Collection[tuple[str, int]]) -> UnetPatcher:
    patched = unet.clone()
    replacements = patched.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    before = next((hook for hook in replacements.values() if isinstance(hook, PicturePrompts)), None)
    others = {place: hook for place, hook in replacements.items() if not isinstance(hook, PicturePrompts)}
    hook = PicturePrompts([*(before.prompts if before else ()), prompt], {**(before.before if before else {}), **others})
    if find_bound_hook({"patches_replace": {"attn2": hook.before}}) is not None:
        hook.held = torch.empty(0)  # a hook that calls a bound hook is bound too
    for place in [place for place in others if len(place) == 3]:
        patched.set_model_attn2_replace(hook, *place)
    for block in sorted(blocks):
        patched.set_model_attn2_replace(hook, *block)
    return patched
