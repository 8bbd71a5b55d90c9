"""Counts a network's costs by running it on the meta device: shapes are real, numbers are not, no weights are made. Takes seconds.

FLOPs come from torch's own formulas per operation; attention is counted as one fused operation, since that is how every device runs it.
Must not know slots or plans.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from backend.nn.unet_program import Program, build_program
from backend.nn.unet_state import UNetState
from backend.original_config import without_original_names
from backend.parallel.costs import ComponentCost, ModelProfile, PieceCost

_FREE_OPERATIONS = ("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "split",
                    "chunk", "detach", "alias", "select", "unbind", "empty", "as_strided", "_reshape_alias", "narrow")  # fmt: skip
_SHARED_WITH_UNET = ("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "cross_attention_dim", "attention_head_dim",
                     "transformer_layers_per_block", "use_linear_projection", "addition_embed_type", "addition_time_embed_dim",
                     "projection_class_embeddings_input_dim", "num_attention_heads", "norm_num_groups", "mid_block_type")  # fmt: skip
_CACHE_LENGTH = 32
_lock = threading.Lock()


class CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs, launched operations and live bytes of what runs inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.num_kernels = 0.0, 0
        self.live_bytes, self.peak_bytes = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if packet.__name__ not in _FREE_OPERATIONS:
            self.num_kernels += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._charge(leaf)
        return result

    def _charge(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        num_bytes = storage.nbytes()
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, address, num_bytes)

    def _release(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.live_bytes -= num_bytes


class FusedAttention(TorchFunctionMode):
    """Counts attention as two matrix products and makes only its output, not its scores."""

    def __init__(self, count: CountFlops) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args[:3]) if len(args) >= 3 else self._attend(**{name: kwargs[name] for name in ("query", "key", "value")})
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *leading, num_queries, width = query.shape
        rows = 1
        for length in leading:
            rows *= length
        self._count.flops += 2.0 * rows * num_queries * key.shape[-2] * (width + value.shape[-1])
        self._count.num_kernels += 1
        return query.new_empty((*leading, num_queries, value.shape[-1]))


def count_unet(
    config: Mapping[str, Any],
    *,
    latent_height: int,
    latent_width: int,
    context_length: int = 77,
    dtype: torch.dtype | None = None,
    name: str = "UNet",
) -> ModelProfile:
    """See `backend.parallel.costs.profile_unet`."""
    with _lock:
        return _count_unet(_as_text(config), latent_height, latent_width, context_length, dtype or torch.float16, name)


@lru_cache(maxsize=_CACHE_LENGTH)
def _count_unet(config_text: str, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype, name: str) -> ModelProfile:
    unet = _make_unet(config_text, dtype)
    program = build_program(unet)
    x_BCHW = torch.empty(1, unet.config.in_channels, latent_height, latent_width, device="meta", dtype=dtype)
    context_BLD = torch.empty(1, context_length, _widest(unet.config.cross_attention_dim), device="meta", dtype=dtype)
    count = CountFlops(unet)
    with torch.no_grad(), count, FusedAttention(count):
        state = program.start(x_BCHW, torch.empty(1, device="meta"), context_BLD, y_BV=_make_vector(unet, dtype))
        pieces = _count_pieces(program, state, count)
    return ModelProfile(
        name=name,
        pieces=pieces,
        embedding_bytes=sum(parameter.nbytes for _, parameter in program.embedding.named_parameters()),
        emb_bytes_per_row=state.emb_BE.nbytes,
        context_bytes_per_row=context_BLD.nbytes,
        latent_bytes_per_row=x_BCHW.nbytes,
        output_bytes_per_row=state.hidden_BCHW.nbytes,
    )


@lru_cache(maxsize=2)
def _make_unet(config_text: str, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return _cast(UNet2DConditionModel.from_config(without_original_names(json.loads(config_text))), dtype)


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All weights in `dtype`; the library's own `to` warns that it would do so."""
    return nn.Module.to(network, dtype=dtype).eval()


def _count_pieces(program: Program, state: UNetState, count: CountFlops) -> tuple[PieceCost, ...]:
    costs: list[PieceCost] = []
    pushed: list[int] = []
    kinds = [segment.kind for segment in program.segments]
    for index, piece in enumerate(program.finest_pieces()):
        flops, kernels, skips = count.flops, count.num_kernels, list(state.skips)
        count.peak_bytes = count.live_bytes
        program.run_piece(piece, state)
        waiting = skips if len(skips) <= len(state.skips) else state.skips
        popped, skip_bytes, control_bytes = None, 0, 0
        if len(state.skips) > len(skips):
            pushed.append(index)
            skip_bytes = state.skips[-1].nbytes
        elif len(state.skips) < len(skips):
            popped = pushed.pop()
            control_bytes = skips[-1].nbytes
        if kinds[piece.segment] == "middle" and piece.end_block is None:
            control_bytes = state.hidden_BCHW.nbytes
        costs.append(
            PieceCost(
                piece=piece,
                weight_bytes=_weight_bytes(program.piece_layers(piece)),
                flops_per_row=count.flops - flops,
                work_per_row=count.flops - flops,
                num_kernels=count.num_kernels - kernels,
                hidden_bytes_per_row=state.hidden_BCHW.nbytes,
                residual_bytes_per_row=0 if state.transformer_input_BCHW is None else state.transformer_input_BCHW.nbytes,
                skip_bytes_per_row=skip_bytes,
                pops_skip_of=popped,
                control_bytes_per_row=control_bytes,
                working_bytes_per_row=count.peak_bytes - sum(skip.nbytes for skip in waiting),
            )
        )
    return tuple(costs)


def _weight_bytes(named_layers: Any) -> int:
    return sum(parameter.nbytes for _, layer in named_layers for parameter in layer.parameters())


def _widest(context_width: int | tuple[int, ...] | list[int]) -> int:
    return context_width if isinstance(context_width, int) else max(context_width)


def _make_vector(unet: Any, dtype: torch.dtype) -> Tensor | None:
    if unet.config.addition_embed_type is None:
        return None
    return torch.empty(1, unet.config.projection_class_embeddings_input_dim, device="meta", dtype=dtype)


def _as_text(config: Mapping[str, Any]) -> str:
    """The config as a key: private entries (where it was read from, versions) do not matter."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True, default=str)


def controlnet_config(unet: Any) -> dict[str, Any]:
    """Arguments of the ControlNetModel that belongs to a UNet."""
    return {name: unet.config[name] for name in _SHARED_WITH_UNET}


def profile_controlnet(
    unet_config: Mapping[str, Any], *, latent_height: int, latent_width: int, context_length: int = 77, dtype: torch.dtype | None = None
) -> ComponentCost:
    """Costs of the ControlNet that belongs to a UNet of this config: a copy of its way in, and one convolution per residual."""
    with _lock:
        return _count_controlnet(_as_text(unet_config), latent_height, latent_width, context_length, dtype or torch.float16)


@lru_cache(maxsize=_CACHE_LENGTH)
def _count_controlnet(config_text: str, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> ComponentCost:
    unet = _make_unet(config_text, dtype)
    with torch.device("meta"):
        controlnet = _cast(ControlNetModel(**controlnet_config(unet)), dtype)
    x_BCHW = torch.empty(1, unet.config.in_channels, latent_height, latent_width, device="meta", dtype=dtype)
    hint_BCHW = torch.empty(1, 3, 8 * latent_height, 8 * latent_width, device="meta", dtype=dtype)
    context_BLD = torch.empty(1, context_length, _widest(unet.config.cross_attention_dim), device="meta", dtype=dtype)
    extra: dict[str, Any] = {}
    if unet.config.addition_embed_type is not None:
        pooled_width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        extra["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled_width, device="meta", dtype=dtype),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    return _count_component(
        "ControlNet", controlnet,
        lambda: controlnet(x_BCHW, torch.empty(1, device="meta"), context_BLD, hint_BCHW, return_dict=False, **extra), runs_per_unit=True,
    )  # fmt: skip


def profile_vae_decoder(config: Mapping[str, Any], *, latent_height: int, latent_width: int, dtype: torch.dtype | None = None) -> ComponentCost:
    """Costs of a VAE: the bytes of all of it, the FLOPs and the working memory of one decode."""
    with _lock:
        return _count_vae_decoder(_as_text(config), latent_height, latent_width, dtype or torch.float16)


@lru_cache(maxsize=_CACHE_LENGTH)
def _count_vae_decoder(config_text: str, latent_height: int, latent_width: int, dtype: torch.dtype) -> ComponentCost:
    with torch.device("meta"):
        vae: Any = _cast(AutoencoderKL.from_config(json.loads(config_text)), dtype)
    latent_BCHW = torch.empty(1, vae.config.latent_channels, latent_height, latent_width, device="meta", dtype=dtype)
    return _count_component("VAE", vae, lambda: vae.decode(latent_BCHW, return_dict=False))


def _count_component(name: str, network: nn.Module, forward: Callable[[], object], *, runs_per_unit: bool = False) -> ComponentCost:
    count = CountFlops(network)
    with torch.no_grad(), count, FusedAttention(count):
        forward()
    return ComponentCost(
        name=name,
        weight_bytes=sum(parameter.nbytes for parameter in network.parameters()),
        flops_per_row=count.flops,
        working_bytes_per_row=count.peak_bytes,
        num_kernels=count.num_kernels,
        runs_per_unit=runs_per_unit,
    )
