"""The parts of a UNet under Forge's names, as views of the real layers: `diffusion_model.input_blocks[4][1].transformer_blocks[0].attn2`.

A view has its layer's attributes. Its `forward` may be replaced, on the object or on the class; the replacement is then called in the layer's place
on every slot that has a copy of the network. While it runs, all views show the layers of the copy that it runs for.

Example: for the third input block's transformer, `view.transformer_blocks[0].attn2.forward = mine` calls `mine(x, context=..., value=...,
transformer_options=...)`; `mine` may call the `forward` it found there before.

Must not know slots, plans or samplers. Shapes: B rows, C channels, H W rows and columns, L M tokens, D width of a token, E width of the embedding.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from backend.attention import attention_function
from backend.nn.layer_names import note_names, running_network
from backend.nn.program import LAYER_VIEWS, Segment, TransformerOptions
from backend.nn.unet_layers import run_block, run_transformer
from backend.nn.unet_state import CONTEXT, HIDDEN, UNetState


class LayerView:
    """A layer by its name in a network."""

    def __init__(self, network: nn.Module, name: str) -> None:
        self.__dict__.update(_network=weakref.ref(network), name=name, inner=())
        """`inner`: the views inside this one."""

    @property
    def layer(self) -> Any:
        """The layer in the network that a hook is called for, else in the network that the view was made for."""
        network = running_network() or self.__dict__["_network"]()
        if network is None:
            raise RuntimeError(f"{self.name}: its network was unloaded. Look at the model again after it was loaded.")
        return network.get_submodule(self.name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.layer(x)
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __setattr__(self, name: str, value: object) -> None:
        """`forward` is replaced for all copies; any other attribute is set on the layer itself."""
        if name != "forward":
            setattr(self.layer, name, value)
        elif value == self._found_forward():
            self.__dict__.pop("forward", None)
        else:
            self.__dict__["forward"] = value

    def __delattr__(self, name: str) -> None:
        if name == "forward":
            self.__dict__.pop("forward", None)
        else:
            delattr(self.layer, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerView:
        """A copied network gets views of its own when its program is built."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def _found_forward(self) -> object:
        return type(self).forward.__get__(self)

    def walk(self) -> Iterator[LayerView]:
        """This view and all inside it."""
        yield self
        for view in self.inner:
            yield from view.walk()


class ResBlock(LayerView):
    """x (B, C, H, W), emb (B, E)."""

    def forward(self, x: Tensor, emb: Tensor, transformer_options: TransformerOptions | None = None) -> Tensor:
        result: Tensor = self.layer(x, emb)
        return result


class Downsample(LayerView):
    """x (B, C, H, W)."""


class Upsample(LayerView):
    """x (B, C, H, W); `output_shape` ends in the wanted rows and columns."""

    def forward(self, x: Tensor, output_shape: Sequence[int] | None = None, transformer_options: TransformerOptions | None = None) -> Tensor:
        result: Tensor = self.layer(x, None if output_shape is None else tuple(output_shape[-2:]))
        return result


class CrossAttention(LayerView):
    """x (B, L, D), context and value (B, M, ...): self-attention without a context."""

    def forward(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, mask: Tensor | None = None,
        transformer_options: TransformerOptions | None = None,
    ) -> Tensor:  # fmt: skip
        layer = self.layer
        context = x if context is None else context
        q_BLD, k_BMD, v_BMD = layer.to_q(x), layer.to_k(context), layer.to_v(context if value is None else value)
        return self.to_out(attention_function(q_BLD, k_BMD, v_BMD, layer.heads, mask))

    def to_out(self, x: Tensor) -> Tensor:
        """The output projection."""
        layer = self.layer
        result: Tensor = layer.to_out[1](layer.to_out[0](x))
        return result

    @property
    def dim_head(self) -> int:
        return int(self.layer.to_q.out_features) // int(self.layer.heads)


class BasicTransformerBlock(LayerView):
    """x (B, L, D), context (B, M, ...). `attn1`, `attn2`: its attentions."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__(network, name)
        own = [CrossAttention(network, f"{name}.{child}") for child in ("attn1", "attn2") if getattr(self.layer, child, None) is not None]
        self.__dict__["inner"] = tuple(own)
        self.__dict__.update({view.name.rpartition(".")[2]: view for view in own})

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options: TransformerOptions | None = None) -> Tensor:
        return run_block(self.layer, x, _state(x, context, transformer_options))


class SpatialTransformer(LayerView):
    """x (B, C, H, W), context (B, M, ...). `transformer_blocks`: its blocks."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__(network, name)
        blocks = [BasicTransformerBlock(network, f"{name}.transformer_blocks.{index}") for index in range(len(self.layer.transformer_blocks))]
        self.__dict__.update(inner=tuple(blocks), transformer_blocks=blocks)

    def forward(self, x: Tensor, context: Tensor | None = None, transformer_options: TransformerOptions | None = None) -> Tensor:
        return run_transformer(self.layer, x, _state(x, context, transformer_options))


class TimestepEmbedSequential(Sequence[LayerView]):
    """The layers of one block, in order. Its own `forward` cannot be replaced: replace those of its layers."""

    def __init__(self, views: Sequence[LayerView]) -> None:
        self._views = tuple(views)

    def __getitem__(self, index: Any) -> Any:
        return self._views[index]

    def __len__(self) -> int:
        return len(self._views)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "forward":
            raise AttributeError(f"The forward of a whole block ({', '.join(map(repr, self._views))}) cannot be replaced, because a plan may cut it. "
                                 "Replace the forward of its layers, or use a block modifier of the patcher.")  # fmt: skip
        super().__setattr__(name, value)

    def children(self) -> Iterator[LayerView]:
        return iter(self._views)

    def __deepcopy__(self, memo: dict[int, Any]) -> TimestepEmbedSequential:
        return self


_KINDS: tuple[tuple[type[nn.Module], type[LayerView]], ...] = (
    (ResnetBlock2D, ResBlock),
    (Transformer2DModel, SpatialTransformer),
    (Downsample2D, Downsample),
    (Upsample2D, Upsample),
)
_OWN_FORWARD: Mapping[type[LayerView], Any] = {
    kind: kind.forward for kind in (LayerView, ResBlock, Downsample, Upsample, CrossAttention, BasicTransformerBlock, SpatialTransformer)
}


def attach_views(network: nn.Module, segments: Sequence[Segment]) -> None:
    """Give a UNet the lists that Forge's has: `input_blocks`, `middle_block`, `output_blocks`, `out`."""
    note_names(network)
    blocks: dict[str, list[TimestepEmbedSequential]] = {"input": [], "middle": [], "output": [], "last": []}
    for segment in segments:
        blocks[segment.kind].append(TimestepEmbedSequential([_view(network, name, layer) for name, layer in segment.named_layers]))
    every = tuple(view for segments in blocks.values() for block in segments for outer in block for view in outer.walk())
    network.__dict__.update(
        input_blocks=blocks["input"], middle_block=next(iter(blocks["middle"]), TimestepEmbedSequential(())), output_blocks=blocks["output"],
        out=blocks["last"][0], _every_view=every,
    )  # fmt: skip


def _view(network: nn.Module, name: str, layer: nn.Module) -> LayerView:
    kind = next((view for layers, view in _KINDS if isinstance(layer, layers)), LayerView)
    return kind(network, name)


def _state(x: Tensor, context: Tensor | None, options: TransformerOptions | None) -> UNetState:
    tensors = {HIDDEN: x} if context is None else {HIDDEN: x, CONTEXT: context}
    return UNetState(tensors, {}, dict(options or {}))


def replaced_views(network: nn.Module) -> dict[str, LayerView]:
    """Views of a network whose `forward` was replaced, on the object or on its class, by name. Asked in every step: a plain loop."""
    own, found = _OWN_FORWARD, {}
    for view in network.__dict__.get("_every_view", ()):
        kind = type(view)
        if "forward" in view.__dict__ or kind.forward is not own[kind]:
            found[view.name] = view
    return found


def with_replaced_views(network: nn.Module, options: TransformerOptions) -> TransformerOptions:
    """Options of a call that also tell the network's layers about replaced forwards."""
    replaced = replaced_views(network)
    return {**options, LAYER_VIEWS: replaced} if replaced else options


def find_forward_binding(network: nn.Module) -> str | None:
    """Why replaced forwards keep the network whole on one slot; None if they do not."""
    whole = [view for view in replaced_views(network).values() if isinstance(view, SpatialTransformer)]
    if whole:
        return f"An extension replaced the forward of {whole[0]!r}, which must run whole"
    own = [name for name, layer in network.named_modules() if "forward" in layer.__dict__]
    return f"An extension replaced the forward of the layer {own[0]} itself and not of its view" if own else None
