"""The decoder of an AutoencoderKL as the parts a strip runs. Checks that the split computes every part exactly.

Reads modules but never changes them; knows no slots and no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from backend.attention import AttentionProcessorForge
from backend.devices.slot import canonical_device


class CannotSplit(ValueError):
    """The picture cannot be decoded in strips; the message says why. Decode it whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpBlock:
    """The resnets of one level, and the convolution after its upsampling (None at the last level)."""

    resnets: tuple[Any, ...]
    upsample_conv: nn.Conv2d | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StripNetwork:
    """The decoder's modules in the order they run. `mid_attentions` has one entry, possibly None, for each mid resnet except the last."""

    post_quant_conv: nn.Conv2d | None
    conv_in: nn.Conv2d
    mid_resnets: tuple[Any, ...]
    mid_attentions: tuple[Any | None, ...]
    up_blocks: tuple[UpBlock, ...]
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    @property
    def scale(self) -> int:
        """Picture rows for each latent row."""
        return 1 << sum(block.upsample_conv is not None for block in self.up_blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype


def read_strip_network(vae: Any, device: torch.device) -> StripNetwork:
    """The parts of an AutoencoderKL whose weights are on `device`.

    Raises: CannotSplit for tiling, unknown kinds of layers, hooks on layers, or weights on another device.
    """
    _require(not vae.use_tiling, "the VAE is set to decode in tiles (use_tiling), which gives a different picture than decoding whole")
    replaced = [name for name in ("decode", "_decode") if name in vae.__dict__]
    _require(not replaced, f"its {', '.join(replaced)} has been replaced by an extension")
    _require(type(vae.decoder) is Decoder, f"its decoder is a {type(vae.decoder).__name__}")
    decoder: Any = vae.decoder
    for name, module in (*_named(decoder, "decoder"), *_named(vae.post_quant_conv, "post_quant_conv")):
        _check_untouched(name, module)
    _check_weights(vae, device)
    _require(type(decoder.conv_act) is nn.SiLU, f"its last activation is {type(decoder.conv_act).__name__}; the split supports only SiLU")
    return StripNetwork(
        post_quant_conv=None if vae.post_quant_conv is None else _conv(vae.post_quant_conv, "post_quant_conv", side=1),
        conv_in=_conv(decoder.conv_in, "conv_in"),
        mid_resnets=_mid_resnets(decoder.mid_block),
        mid_attentions=tuple(None if attention is None else _attention(attention) for attention in decoder.mid_block.attentions),
        up_blocks=tuple(_up_block(block, f"up_blocks.{index}") for index, block in enumerate(decoder.up_blocks)),
        norm_out=_norm(decoder.conv_norm_out, "conv_norm_out"),
        conv_out=_conv(decoder.conv_out, "conv_out"),
    )


def has_strips(vae: Any) -> bool:
    """Whether the network's kind of decoder can be split at all. Qwen-Image's cannot."""
    return type(vae.decoder) is Decoder


def _require(holds: bool, truth: str) -> None:
    if not holds:
        raise CannotSplit(f"This VAE cannot be decoded in strips: {truth}. It is decoded whole.")


def _named(module: nn.Module | None, name: str) -> Iterator[tuple[str, nn.Module]]:
    return iter(()) if module is None else module.named_modules(prefix=name)


def _check_untouched(name: str, module: Any) -> None:
    """Strips compute from the layers' weights, so they would bypass a hook or a replaced forward."""
    hooks = [kind for kind in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, kind)]
    replaced = [attribute for attribute in ("forward", "_conv_forward") if attribute in module.__dict__]
    _require(not hooks, f"{name} has forward hooks (its weights stream in, or an extension watches it)")
    _require(not replaced, f"{name} has had its {', '.join(replaced)} replaced")


def _check_weights(vae: Any, device: torch.device) -> None:
    wanted = canonical_device(device)
    for part, owner in (("decoder", vae.decoder), ("post_quant_conv", vae.post_quant_conv)):
        for name, parameter in _named_parameters(owner):
            _require(canonical_device(parameter.device) == wanted, f"{part}.{name} is on {parameter.device}, the strip on {wanted}")
            _require(parameter.dtype == vae.decoder.conv_in.weight.dtype, f"{part}.{name} is {parameter.dtype}, other weights are not")
            _require(parameter.is_floating_point() and parameter.dtype.itemsize >= 2, f"{part}.{name} is stored as {parameter.dtype}")


def _named_parameters(module: nn.Module | None) -> Iterator[tuple[str, nn.Parameter]]:
    return iter(()) if module is None else module.named_parameters()


def _conv(conv: Any, name: str, *, side: int = 3) -> nn.Conv2d:
    _require(type(conv) is nn.Conv2d, f"{name} is a {type(conv).__name__}, not a plain convolution")
    is_known = conv.kernel_size == (side, side) and conv.padding in (((side - 1) // 2,) * 2, "same") and conv.padding_mode == "zeros"
    is_dense = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    _require(is_known and is_dense, f"{name} is {conv}; strips support only {side}x{side} with zero padding around the picture")
    found: nn.Conv2d = conv
    return found


def _norm(norm: Any, name: str) -> nn.GroupNorm:
    _require(type(norm) is nn.GroupNorm and norm.affine, f"{name} is {norm}, not a group norm with scale and shift")
    found: nn.GroupNorm = norm
    return found


def _resnet(block: Any, name: str) -> Any:
    _require(type(block) is ResnetBlock2D, f"{name} is a {type(block).__name__}")
    _require(block.time_emb_proj is None and block.time_embedding_norm in ("default", "group"), f"{name} takes a time embedding")
    _require(block.upsample is None and block.downsample is None, f"{name} changes the size of the picture")
    _require(type(block.nonlinearity) is nn.SiLU, f"{name} uses {type(block.nonlinearity).__name__}; the split supports only SiLU")
    _require(block.dropout.p == 0 or not block.training, f"{name} has active dropout (the network is in training mode)")
    _norm(block.norm1, f"{name}.norm1"), _norm(block.norm2, f"{name}.norm2")
    _conv(block.conv1, f"{name}.conv1"), _conv(block.conv2, f"{name}.conv2")
    if block.conv_shortcut is not None:
        _conv(block.conv_shortcut, f"{name}.conv_shortcut", side=1)
    return block


def _mid_resnets(mid_block: Any) -> tuple[Any, ...]:
    _require(type(mid_block) is UNetMidBlock2D, f"its mid block is a {type(mid_block).__name__}")
    _require(len(mid_block.resnets) == len(mid_block.attentions) + 1, "its mid block does not have exactly one more resnet than attentions")
    return tuple(_resnet(block, f"mid_block.resnets.{index}") for index, block in enumerate(mid_block.resnets))


def _attention(attention: Any) -> Any:
    _require(type(attention) is Attention, f"its mid attention is a {type(attention).__name__}")
    processor = type(attention.processor)
    _require(
        processor in (AttnProcessor, AttnProcessor2_0, AttentionProcessorForge), f"its mid attention uses the unknown processor {processor.__name__}"
    )
    extras = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    extra = [extra for extra in extras if getattr(attention, extra, None) is not None]
    _require(not extra, f"its mid attention has {', '.join(extra)}")
    _require(attention.scale_qk and not attention.fused_projections, "its mid attention is unscaled or has fused projections")
    _require(attention.to_out[1].p == 0 or not attention.training, "its mid attention has active dropout (the network is in training mode)")
    for name in ("to_q", "to_k", "to_v"):
        _require(type(getattr(attention, name)) is nn.Linear, f"its mid attention's {name} is a {type(getattr(attention, name)).__name__}")
    _require(type(attention.to_out[0]) is nn.Linear, f"its mid attention's to_out is a {type(attention.to_out[0]).__name__}")
    _require(attention.inner_kv_dim == attention.inner_dim, "its mid attention has fewer heads for keys than for queries")
    _norm(attention.group_norm, "mid_block.attentions.group_norm")
    return attention


def _up_block(block: Any, name: str) -> UpBlock:
    _require(type(block) is UpDecoderBlock2D, f"{name} is a {type(block).__name__}")
    upsamplers = tuple(block.upsamplers or ())
    _require(len(upsamplers) <= 1, f"{name} has {len(upsamplers)} upsamplers")
    return UpBlock(
        resnets=tuple(_resnet(resnet, f"{name}.resnets.{index}") for index, resnet in enumerate(block.resnets)),
        upsample_conv=_upsample_conv(upsamplers[0], name) if upsamplers else None,
    )


def _upsample_conv(upsampler: Any, name: str) -> nn.Conv2d:
    is_plain = type(upsampler) is Upsample2D and upsampler.use_conv and not upsampler.use_conv_transpose
    _require(is_plain and upsampler.interpolate and upsampler.norm is None, f"{name}.upsamplers.0 is not nearest-neighbor doubling and a convolution")
    conv = upsampler.conv if upsampler.name == "conv" else upsampler.Conv2d_0
    return _conv(conv, f"{name}.upsamplers.0.conv")
