"""Counts a network's costs by running it on the meta device: real shapes, no numbers, no weights allocated. Takes seconds.

FLOPs come from torch's own formulas per operation. Attention counts as one fused operation, because that is how every device runs it.
Must not know slots or plans.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ConfigMixin, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from backend.nn.controlnet import HINT_STEP_PX, ControlNetwork
from backend.nn.empty_network import make_empty_network
from backend.nn.picture_vae import PictureVae
from backend.nn.piece import Piece
from backend.nn.program import Program, ProgramState, Reading, trace_tensors
from backend.nn.tiles import TileTraffic
from backend.nn.unet_program import build_program
from backend.original_config import without_original_names
from backend.parallel.planning.costs import ComponentCost, ModelProfile, PieceCost, TakenSkip, with_measured_ms
from backend.storage.kinds import dequantizing_bytes, module_stored_bytes, stored_bytes

_FREE_OPERATIONS = ("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "split",
                    "chunk", "detach", "alias", "select", "unbind", "empty", "as_strided", "_reshape_alias", "narrow")  # fmt: skip
_CACHE_LENGTH = 32
_lock = threading.Lock()
Key = TypeVar("Key")
Count = TypeVar("Count")


class CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs, launched operations and live bytes of what runs inside it."""

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
    """Counts attention as two matrix products and allocates only its output, not its scores."""

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


def profile_unet(
    config: Mapping[str, Any],
    *,
    latent_height: int,
    latent_width: int,
    context_length: int = 77,
    dtype: torch.dtype | None = None,
    name: str = "UNet",
    measured_ms: Mapping[Piece, float] | None = None,
) -> ModelProfile:
    """Costs of a diffusers UNet of this config, counted on the meta device without allocating weights. `dtype` defaults to float16.

    Cached per config, shape and dtype. `measured_ms` replaces the shares of work (see `with_measured_ms`).
    Raises: ValueError for a UNet that cannot be cut into segments.
    """
    key = (UNet2DConditionModel, _as_text(config))
    size = _Size(latent_height, latent_width, context_length, dtype or torch.float16)
    profile = _counted(key, size, build_program, lambda: _make_unet(key[1], size.dtype), name)
    return with_measured_ms(profile, measured_ms) if measured_ms else profile


def profile_network(
    network: nn.Module, build: Callable[[Any], Program], *, latent_height: int, latent_width: int, context_length: int = 77, dtype: torch.dtype
) -> ModelProfile:
    """Costs of any network for which `build` makes a program, counted on the meta device. Cached per class, configuration, shape and dtype."""
    size = _Size(latent_height, latent_width, context_length, dtype)
    name = "UNet" if isinstance(network, UNet2DConditionModel) else type(network).__name__
    return _counted(_describe(network), size, build, lambda: _cast(make_empty_network(network, keeps_packed=False), dtype), name)


@dataclass(frozen=True, slots=True)
class _Size:
    """What a network's costs depend on besides its architecture."""

    latent_height: int
    latent_width: int
    context_length: int
    dtype: torch.dtype

    def example_rows(self, program: Program) -> dict[str, Tensor]:
        return program.example_rows(
            latent_height=self.latent_height, latent_width=self.latent_width, context_length=self.context_length, dtype=self.dtype
        )


_counts: OrderedDict[tuple[Any, _Size, str], ModelProfile] = OrderedDict()
_control_counts: OrderedDict[tuple[Any, _Size], ComponentCost | None] = OrderedDict()


def _counted(key: Any, size: _Size, build: Callable[[Any], Program], make_empty: Callable[[], nn.Module], name: str) -> ModelProfile:
    """The profile of a network without weights, counted once per key, size and name. The most recently used are cached."""
    with _lock:
        if (key, size, name) not in _counts:
            network = make_empty()
            program = build(network)
            _counts[key, size, name] = count_program(program, network, size.example_rows(program), name=name)
        return _keep(_counts, (key, size, name))


def _keep(counts: OrderedDict[Key, Count], key: Key) -> Count:
    """The count, now the most recently used. The least recently used beyond the cache's length go."""
    counts.move_to_end(key)
    if len(counts) > _CACHE_LENGTH:
        counts.popitem(last=False)
    return counts[key]


def _describe(network: nn.Module) -> tuple[type, str]:
    """Class, and configuration or else names and shapes of weights. Networks for which they agree are treated as equal."""
    if isinstance(network, ConfigMixin):
        return type(network), _as_text(without_original_names(network.config))
    return type(network), str([(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()])


def count_program(program: Program, network: nn.Module, rows: Mapping[str, Tensor], *, name: str) -> ModelProfile:
    """Costs of a program for one row of inputs. `network` owns the weights; both are on the meta device."""
    count = CountFlops(network)
    with torch.no_grad(), count, FusedAttention(count):
        state = program.start(rows)
        constants = [state.tensors[name] for name in program.constants if name in state.tensors]
        pieces = _count_pieces(program, state, count)
    given = {id(tensor) for tensor in rows.values()}
    return ModelProfile(
        name=name,
        pieces=pieces,
        embedding_bytes=stored_bytes(parameter for _, parameter in program.embedding.named_parameters()),
        emb_bytes_per_row=sum(tensor.nbytes for tensor in constants if id(tensor) not in given),
        context_bytes_per_row=sum(tensor.nbytes for tensor in constants if id(tensor) in given),
        latent_bytes_per_row=rows["x"].nbytes,
        output_bytes_per_row=state.tensors[program.output].nbytes,
        tiles=program.tile_traffic(rows) if program.why_no_tiles() is None else None,
        itemsize=rows["x"].element_size(),
    )


def empty_unet(config: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> nn.Module:
    """A diffusers UNet of this config on the meta device."""
    with _lock:
        return _make_unet(_as_text(config), dtype)


@lru_cache(maxsize=2)
def _make_unet(config_text: str, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return _cast(UNet2DConditionModel.from_config(without_original_names(json.loads(config_text))), dtype)


def _cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """All weights in `dtype`. Bypasses the library's own `to`, which warns about this cast."""
    return nn.Module.to(network, dtype=dtype).eval()


def _count_pieces(program: Program, state: ProgramState, count: CountFlops) -> tuple[PieceCost, ...]:
    pieces = program.finest_pieces()
    readings = trace_tensors(program, pieces)
    left: dict[tuple[int, str], int] = {}
    costs: list[PieceCost] = []
    for index, piece in enumerate(pieces):
        flow = program.flow(piece)
        before = {name: tensor.nbytes for name, tensor in state.tensors.items()}  # numbers only: a reference would count as a live tensor
        flops, kernels = count.flops, count.num_kernels
        count.peak_bytes = count.live_bytes
        program.run_piece(piece, state)
        sizes = {**before, **{name: tensor.nbytes for name, tensor in state.tensors.items()}}
        own = [reading for reading in readings if reading.source == index]
        made = [*own, *(reading for reading in readings if index == 0 and reading.source < 0)]
        left.update({(one.source, one.name): (before if one.source < 0 else sizes).get(one.name, 0) for one in made})
        goes_on = [one.name for one in own if index + 1 in one.readers] if index + 1 < len(pieces) else [program.output]
        carried = [] if piece.end_block is None else [name for name in goes_on if name not in program.segments[piece.segment].produces]
        costs.append(
            PieceCost(
                piece=piece,
                weight_bytes=_weight_bytes(program.piece_layers(piece)),
                largest_layer_bytes=_largest_layer_bytes(program.piece_layers(piece)),
                flops_per_row=count.flops - flops,
                work_per_row=count.flops - flops,
                num_kernels=count.num_kernels - kernels,
                hidden_bytes_per_row=sum(sizes[name] for name in goes_on if name not in carried),
                residual_bytes_per_row=sum(sizes[name] for name in carried),
                skip_bytes_per_row=sum(left[one.source, one.name] for one in made if _is_skip(one)),
                takes=tuple(
                    TakenSkip(max(one.source, 0), left[one.source, one.name]) for one in readings if _is_skip(one) and one.readers[-1] == index
                ),
                control_bytes_per_row=int(program.residual_share * sum(sizes[one.target] for one in flow.adds if one.kind in program.control_kinds)),
                working_bytes_per_row=count.peak_bytes
                - sum(num_bytes for name, num_bytes in before.items() if name not in (*flow.consumes, *program.constants)),
            )
        )
    return tuple(costs)


def _is_skip(reading: Reading) -> bool:
    """Whether a tensor waits for a piece after the next one. It counts until its last reader."""
    return reading.readers[-1] > max(reading.source, 0) + 1


def _weight_bytes(named_layers: Any) -> int:
    return module_stored_bytes(layer for _, layer in named_layers)


def _largest_layer_bytes(named_layers: Any) -> int:
    """Bytes of the largest module's own tensors: what streaming fetches at once."""
    modules = (module for _, layer in named_layers for module in layer.modules())
    own_bytes = (stored_bytes((*module.parameters(recurse=False), *module.buffers(recurse=False))) for module in modules)
    return max(own_bytes, default=0)


def _as_text(config: Mapping[str, Any]) -> str:
    """The config as a key, without private entries (where it was read from, versions)."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True, default=str)


def with_stored_bytes(profile: ModelProfile, program: Program) -> ModelProfile:
    """The profile with the bytes that this network's weights take in memory, whatever type they are computed in.

    What dequantizing a packed weight takes counts as working memory, once per row to be on the safe side.
    """
    pieces = tuple(
        replace(
            cost,
            weight_bytes=module_stored_bytes(layer for _, layer in program.piece_layers(cost.piece)),
            largest_layer_bytes=_largest_layer_bytes(program.piece_layers(cost.piece)),
            working_bytes_per_row=cost.working_bytes_per_row
            + dequantizing_bytes((layer for _, layer in program.piece_layers(cost.piece)), profile.itemsize),
        )
        for cost in profile.pieces
    )
    return replace(profile, pieces=pieces, embedding_bytes=module_stored_bytes(layer for _, layer in program.embedding.named_layers))


def profile_control_network(
    network: nn.Module, program: Program, *, latent_height: int, latent_width: int, context_length: int = 77, dtype: torch.dtype | None = None
) -> ComponentCost | None:
    """Costs of a usual ControlNet for a network and its program; None if its family has no ControlNets. Cached like the network's own."""
    size = _Size(latent_height, latent_width, context_length, dtype or torch.float16)
    key = (_describe(network), size)
    with _lock:
        if key not in _control_counts:
            _control_counts[key] = _count_control_network(program, size)
        return _keep(_control_counts, key)


def _count_control_network(program: Program, size: _Size) -> ComponentCost | None:
    control = program.build_control_network()
    if control is None:
        return None
    control, rows = _cast(control, size.dtype), size.example_rows(program)
    hint_BCHW = torch.empty(1, 3, HINT_STEP_PX * size.latent_height, HINT_STEP_PX * size.latent_width, device="meta", dtype=size.dtype)
    cost = _count_component("ControlNet", control, lambda: control(hint=hint_BCHW, **rows), runs_per_row=True)
    return replace(cost, tiles=_traffic_of_control(control, size.latent_height, size.latent_width))


def _traffic_of_control(control: nn.Module, height: int, width: int) -> TileTraffic | None:
    return control.tile_traffic(height, width) if isinstance(control, ControlNetwork) and control.why_no_tiles() is None else None


def profile_vae_decoder(config: Mapping[str, Any], *, latent_height: int, latent_width: int, dtype: torch.dtype | None = None) -> ComponentCost:
    """Costs of a VAE, an AutoencoderKL or a PictureVae: the bytes of the whole model, the FLOPs and working memory of one decode."""
    with _lock:
        return _count_vae_decoder(_as_text(config), latent_height, latent_width, dtype or torch.float16)


@lru_cache(maxsize=_CACHE_LENGTH)
def _count_vae_decoder(config_text: str, latent_height: int, latent_width: int, dtype: torch.dtype) -> ComponentCost:
    with torch.device("meta"):
        config = json.loads(config_text)
        vae: Any = _cast((PictureVae if "has_time" in config else AutoencoderKL).from_config(config), dtype)
    latent_BCHW = torch.empty(1, vae.config.latent_channels, latent_height, latent_width, device="meta", dtype=dtype)
    return _count_component("VAE", vae, lambda: vae.decode(latent_BCHW, return_dict=False))


def _count_component(name: str, network: nn.Module, forward: Callable[[], object], *, runs_per_row: bool = False) -> ComponentCost:
    count = CountFlops(network)
    with torch.no_grad(), count, FusedAttention(count):
        forward()
    return ComponentCost(
        name=name,
        weight_bytes=sum(parameter.nbytes for parameter in network.parameters()),
        flops_per_row=count.flops,
        working_bytes_per_row=count.peak_bytes,
        num_kernels=count.num_kernels,
        runs_per_row=runs_per_row,
    )
