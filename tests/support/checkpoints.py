"""Checkpoint files for tests: narrow members of each family with random weights, and the networks they were written from.

The networks come from diffusers and transformers, so a test has an independent reference. Norms and biases are random too: in a newly created
network they are all ones and zeros, and a swapped key would go unnoticed.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import OrderedDict
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from backend.families.registry import find_family

FAMILIES = ("sd15", "sd20", "sd21_v", "sdxl")
REFINER = "sdxl_refiner"
DISTILLED = ("small-sd", "tiny-sd")
"""SD1 with one resnet per level and no middle block (BK-SDM small and tiny, by their published configurations)."""
VOCAB_LENGTH = 49408
EOS_TOKEN_ID = 49407
SDXL_TIME_IDS_WIDTH = 6 * 256
SDXL_PROJECTION_DIM = 64
MOST_KEPT, MOST_KEPT_WIDTH = 8, 64
LATENT_SCALE = {"sd15": 0.18215, "sd20": 0.18215, "sd21_v": 0.18215, "sdxl": 0.13025, REFINER: 0.13025, **dict.fromkeys(DISTILLED, 0.18215)}


@dataclass(frozen=True, kw_only=True)
class ReferenceModels:
    """The networks in a file: diffusers' and transformers' own modules, in eval mode, fp32, weights rounded to the file's dtype."""

    path: Path
    family: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[nn.Module, ...]
    prediction: str
    latent_scale: float

    def scheduler_config(self) -> dict[str, Any]:
        """Settings for any of diffusers' schedulers: the noise schedule used to train all these families."""
        return {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": self.prediction,
            "steps_offset": 1,
        }


def write_checkpoint(
    path: Path,
    family: str,
    *,
    width: int = 32,
    seed: int = 0,
    layout: str = "ldm",
    prediction: str = "epsilon",
    inpaint: bool = False,
    is_shallow: bool = False,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> ReferenceModels:
    """Write one random checkpoint and return its networks.

    `width` is the UNet's narrowest level (a multiple of 32). `layout`: "ldm" (original single file) or "diffusers" (unet., vae., text_encoder.
    and text_encoder_2. before the libraries' own keys). `prediction`: "epsilon" or "v_prediction"; "sd21_v" always predicts v. A v-prediction
    SDXL file is marked by the key `v_pred`, the others by metadata, as such files are found in the field. `.ckpt` and `.pt` paths are pickled.
    `is_shallow`: two levels in the UNet, one resnet per level, so that pictures take a third of the time. For tests of what is around the networks.
    """
    prediction = "v_prediction" if family == "sd21_v" else prediction
    facts = _Facts(family, width, seed, layout, prediction, inpaint, is_shallow, dtype, tuple(sorted((metadata or {}).items())), path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    if width > MOST_KEPT_WIDTH:
        models = _make(facts, path)
    else:
        models, kept = _kept.get(facts)
        shutil.copyfile(kept, path)
    return CopiedModels(models, path)


class CopiedModels(ReferenceModels):
    """The same with networks of its own, each copied when it is first asked for: most tests look at none or one."""

    def __init__(self, kept: ReferenceModels, path: Path) -> None:
        self.__dict__.update({field.name: getattr(kept, field.name) for field in fields(kept)}, path=path)
        for name in ("unet", "vae", "text_encoders"):
            del self.__dict__[name]
        self.__dict__["_kept"] = kept

    def __getattr__(self, name: str) -> Any:
        if name not in ("unet", "vae", "text_encoders"):
            raise AttributeError(name)
        return self.__dict__.setdefault(name, deepcopy(getattr(self.__dict__["_kept"], name)))

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedModels:
        copied = CopiedModels(self.__dict__["_kept"], self.path)
        copied.__dict__.update({name: deepcopy(self.__dict__[name], memo) for name in ("unet", "vae", "text_encoders") if name in self.__dict__})
        return copied


@dataclass(frozen=True, slots=True)
class _Facts:
    """The parameters of a file; equal parameters give equal bytes."""

    family: str
    width: int
    seed: int
    layout: str
    prediction: str
    inpaint: bool
    is_shallow: bool
    dtype: torch.dtype
    metadata: tuple[tuple[str, str], ...]
    suffix: str


def _make(facts: _Facts, path: Path) -> ReferenceModels:
    named = {name: getattr(facts, name) for name in ("width", "seed", "prediction", "inpaint", "is_shallow")}
    models = build_models(path, facts.family, **named)
    for module in (models.unet, models.vae, *models.text_encoders):
        _round_weights(module, facts.dtype)
    state_dict = _state_dict(models, facts.layout, facts.dtype)
    marks = dict(facts.metadata)
    if facts.prediction == "v_prediction":
        if facts.family == "sdxl":
            state_dict["v_pred"] = torch.zeros(1)
        else:
            marks["modelspec.prediction_type"] = "v"
    if facts.suffix == ".safetensors":
        save_file(state_dict, path, metadata={"format": "pt", **marks})
    else:
        torch.save({"state_dict": state_dict, "global_step": 1}, path)
    return models


class _Kept:
    """The last files of this process with their networks: most tests use one of a few, and copying is faster than creating."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._made: OrderedDict[_Facts, tuple[ReferenceModels, Path]] = OrderedDict()
        self._number = 0

    def get(self, facts: _Facts) -> tuple[ReferenceModels, Path]:
        if facts not in self._made:
            self._number += 1
            path = self._make_folder() / f"{self._number}{facts.suffix}"
            self._made[facts] = (_make(facts, path), path)
            if len(self._made) > MOST_KEPT:
                self._made.popitem(last=False)[1][1].unlink()
        self._made.move_to_end(facts)
        return self._made[facts]

    def _make_folder(self) -> Path:
        """Created once, removed when the process ends."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="checkpoints-"))
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder


_kept = _Kept()


def build_models(
    path: Path,
    family: str,
    *,
    width: int = 32,
    seed: int = 0,
    prediction: str = "epsilon",
    inpaint: bool = False,
    is_shallow: bool = False,
) -> ReferenceModels:
    """Only the networks, nothing written. Narrow ones are copies of those that the process has built before."""
    if family not in LATENT_SCALE:
        raise ValueError(f"family {family!r} is none of {', '.join(LATENT_SCALE)}")
    facts = (family, width, seed, prediction, inpaint, is_shallow)
    return replace(_build_models(*facts), path=path) if width > MOST_KEPT_WIDTH else CopiedModels(_kept_models(*facts), path)


def _build_models(family: str, width: int, seed: int, prediction: str, inpaint: bool, is_shallow: bool) -> ReferenceModels:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoders = _build_text_encoders(family)
        build_unet = _build_shallow_unet if is_shallow else _build_unet
        unet = build_unet(family, width, in_channels=9 if inpaint else 4, context_width=sum(e.config.hidden_size for e in text_encoders))
        vae = _build_vae(width, LATENT_SCALE[family], layers_per_block=1 if is_shallow else 2)
        for module in (unet, vae, *text_encoders):
            _shake_norms_and_biases(module)
            module.eval().requires_grad_(False)
        _set_output_scales(unet, vae)
    return ReferenceModels(
        path=Path("none"),
        family=family,
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        prediction=prediction,
        latent_scale=LATENT_SCALE[family],
    )


_kept_models = lru_cache(maxsize=MOST_KEPT)(_build_models)


def head_count(channels: int) -> int:
    """SD2's and SDXL's heads: 64 wide, or in narrow members the widest smaller divisor of the level's width."""
    return channels // max(size for size in range(1, 65) if channels % size == 0)


def _build_unet(family: str, width: int, *, in_channels: int, context_width: int) -> UNet2DConditionModel:
    common: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": in_channels,
        "layers_per_block": 2,
        "cross_attention_dim": context_width,
    }
    if family == "sdxl":
        widths = (width, 2 * width, 4 * width)
        return UNet2DConditionModel(
            **common,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 4),
            attention_head_dim=tuple(head_count(w) for w in widths),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=SDXL_TIME_IDS_WIDTH + SDXL_PROJECTION_DIM,
        )
    if family == "tiny-sd":
        return UNet2DConditionModel(
            **{**common, "layers_per_block": 1},
            block_out_channels=(width, 2 * width, 4 * width),
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            attention_head_dim=8,
        )
    widths_4 = (width, 2 * width, 4 * width, 4 * width)
    if family == REFINER:
        return UNet2DConditionModel(
            **common,
            block_out_channels=widths_4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=4,
            attention_head_dim=tuple(head_count(w) for w in widths_4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=5 * 256 + SDXL_PROJECTION_DIM,
        )
    is_sd1 = family in ("sd15", "small-sd")
    if family == "small-sd":
        common |= {"layers_per_block": 1, "mid_block_type": None}
    return UNet2DConditionModel(
        **common,
        block_out_channels=widths_4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=8 if is_sd1 else tuple(head_count(w) for w in widths_4),
        use_linear_projection=not is_sd1,
    )


def _build_shallow_unet(family: str, width: int, *, in_channels: int, context_width: int) -> UNet2DConditionModel:
    is_sdxl, is_sd1 = family in ("sdxl", REFINER), family == "sd15"
    extra: dict[str, Any] = {}
    if is_sdxl:
        num_measures = 6 if family == "sdxl" else 5
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        extra["projection_class_embeddings_input_dim"] = num_measures * 256 + SDXL_PROJECTION_DIM
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        layers_per_block=1,
        cross_attention_dim=context_width,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D") if is_sdxl else ("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D") if is_sdxl else ("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8 if is_sd1 else (head_count(width), head_count(2 * width)),
        use_linear_projection=not is_sd1,
        **extra,
    )


def _build_vae(width: int, latent_scale: float, layers_per_block: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=layers_per_block,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=latent_scale,
        sample_size=64,
    )


def _build_text_encoders(family: str) -> tuple[Any, ...]:
    if family in ("sd15", *DISTILLED):
        return (CLIPTextModel(_text_config(width=64, num_layers=4, activation="quick_gelu")),)
    if family in ("sdxl", REFINER):
        clip_l = CLIPTextModel(_text_config(width=64, num_layers=3, activation="quick_gelu"))
        clip_g = CLIPTextModelWithProjection(_text_config(width=96, num_layers=4, activation="gelu", projection_dim=SDXL_PROJECTION_DIM))
        return (clip_l, clip_g) if family == "sdxl" else (clip_g,)
    return (CLIPTextModel(_text_config(width=96, num_layers=3, activation="gelu")),)


def _text_config(*, width: int, num_layers: int, activation: str, projection_dim: int | None = None) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCAB_LENGTH,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=head_count(width),
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=projection_dim or width,
        bos_token_id=EOS_TOKEN_ID - 1,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=EOS_TOKEN_ID if activation == "quick_gelu" else 0,
    )


@torch.no_grad()
def _shake_norms_and_biases(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.05)


@torch.no_grad()
def _set_output_scales(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Noise-like outputs with standard deviation 0.5 from the UNet; from the VAE pictures mostly within -1..1 and latents of about unit scale."""
    context_BLC = torch.randn(1, 77, unet.config.cross_attention_dim)
    sample_BCHW = torch.randn(1, unet.config.in_channels, 8, 8)
    extra: dict[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        extra["added_cond_kwargs"] = {"text_embeds": torch.randn(1, SDXL_PROJECTION_DIM), "time_ids": torch.full((1, _num_measures(unet)), 64.0)}
    noise_BCHW = unet(sample_BCHW, 500, context_BLC, **extra).sample
    unet.conv_out.weight.mul_(0.5 / noise_BCHW.std())
    picture_BCHW = vae.decode(torch.randn(1, 4, 8, 8) / vae.config.scaling_factor).sample
    vae.decoder.conv_out.weight.mul_(0.4 / picture_BCHW.std())
    moments_BCHW = vae.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latent_dist
    vae.quant_conv.weight[:4].mul_(1 / (vae.config.scaling_factor * moments_BCHW.mean.std()))
    vae.quant_conv.bias[4:].sub_(8.0)  # logvar: a posterior as narrow as a trained VAE's


def _num_measures(unet: UNet2DConditionModel) -> int:
    return int((unet.config.projection_class_embeddings_input_dim - SDXL_PROJECTION_DIM) // unet.config.addition_time_embed_dim)


@torch.no_grad()
def _round_weights(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))


def _family_name(kind: str) -> str:
    return "sd15" if kind in DISTILLED else "sd20" if kind == "sd21_v" else kind


def _state_dict(models: ReferenceModels, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    if layout == "ldm":
        joined = find_family(_family_name(models.family)).join_checkpoint(models.unet, models.vae, models.text_encoders)
    elif layout == "diffusers":
        parts: dict[str, nn.Module] = {"unet": models.unet, "vae": models.vae}
        parts.update({("text_encoder", "text_encoder_2")[index]: encoder for index, encoder in enumerate(models.text_encoders)})
        joined = {f"{name}.{key}": tensor for name, module in parts.items() for key, tensor in module.state_dict().items()}
    else:
        raise ValueError(f"layout {layout!r} is neither 'ldm' nor 'diffusers'")
    return {key: tensor.to(dtype).contiguous() for key, tensor in joined.items()}
