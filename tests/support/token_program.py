"""A made-up network that is not a UNet: two transformer blocks over picture and text tokens, like the DiT families, and an output projection.

Rows: "x" latents (B, C, H, W), "sigma" (B,), "text" (B, L, D), "guidance" (B,). No name in it occurs in a UNet's segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from backend.nn.program import Addition, Exchange, NamedLayers, Program, ProgramState, Segment, TransformerOptions

CHANNELS, WIDTH, NUM_BLOCKS = 4, 16, 2


class JointBlock(nn.Module):
    """Both streams attend to both; then each passes through its own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_picture, self.qkv_text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out_picture, self.out_text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, picture_BLD: Tensor, text_BLD: Tensor, modulation_BD: Tensor) -> tuple[Tensor, Tensor]:
        qkv = torch.cat([self.qkv_picture(picture_BLD), self.qkv_text(text_BLD)], dim=1) * (1 + modulation_BD[:, None].repeat(1, 1, 3))
        mixed = scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        num_tokens = picture_BLD.shape[1]
        return picture_BLD + self.out_picture(mixed[:, :num_tokens]), text_BLD + self.out_text(mixed[:, num_tokens:])


class TokenNetwork(nn.Module):
    """The whole network with its own `forward`, which the program must match."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(CHANNELS, WIDTH)
        self.modulate = nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(JointBlock() for _ in range(NUM_BLOCKS))
        self.leave = nn.Linear(WIDTH, CHANNELS)

    def embed(self, x_BCHW: Tensor, sigma_B: Tensor, guidance_B: Tensor) -> tuple[Tensor, Tensor]:
        conditions = torch.stack([sigma_B, guidance_B], dim=-1).to(x_BCHW.dtype)
        return self.enter(x_BCHW.flatten(2).transpose(1, 2)), self.modulate(conditions)

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, guidance_B: Tensor, residuals: Sequence[Tensor] = ()) -> Tensor:
        picture, modulation = self.embed(x_BCHW, sigma_B, guidance_B)
        for number, block in enumerate(self.blocks):
            picture, text_BLD = block(picture, text_BLD, modulation)
            if residuals:
                picture = picture + residuals[number]
        return self.leave(picture).transpose(1, 2).reshape(x_BCHW.shape)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockSegment(Segment):
    def __call__(self, state: ProgramState, first_block: int = 0, end_block: int | None = None) -> None:
        tensors = state.tensors
        (block,) = self.layers
        tensors["picture"], tensors["prose"] = block(tensors["picture"], tensors["prose"], tensors["modulation"])
        self.add_residuals(state, at_end=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class LeaveSegment(Segment):
    def __call__(self, state: ProgramState, first_block: int = 0, end_block: int | None = None) -> None:
        (leave,) = self.layers
        state.tensors["answer"] = leave(state.tensors.pop("picture")).transpose(1, 2).reshape(state.options["latent_shape"])


@dataclass(frozen=True, eq=False)
class TokenEmbedding:
    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        return (("enter", self.network.enter), ("modulate", self.network.modulate))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenProgram(Program):
    embedding: TokenEmbedding

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        picture, modulation = self.embedding.network.embed(rows["x"], rows["sigma"], rows["guidance"])
        tensors = {"picture": picture, "prose": rows["text"], "modulation": modulation}
        return ProgramState(tensors, dict(residuals or {}), {**(options or {}), "latent_shape": rows["x"].shape})

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "x": torch.empty(1, CHANNELS, latent_height, latent_width, device="meta", dtype=dtype),
            "sigma": torch.empty(1, device="meta"),
            "guidance": torch.empty(1, device="meta"),
            "text": torch.empty(1, context_length, WIDTH, device="meta", dtype=dtype),
        }

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        return 8.0 * WIDTH * shape[0] * shape[2] * shape[3] * itemsize


def build_token_program(network: TokenNetwork) -> TokenProgram:
    blocks = [
        BlockSegment(
            kind="joint",
            number=number,
            named_layers=((f"blocks.{number}", block),),
            consumes=("picture", "prose"),
            produces=("picture", "prose"),
            adds=(Addition("joint", NUM_BLOCKS - 1 - number, "picture"),),
            exchanges=(Exchange("keys and values", f"blocks.{number}"),),
        )
        for number, block in enumerate(network.blocks)
    ]
    leave = LeaveSegment(kind="leave", number=0, named_layers=(("leave", network.leave),), consumes=("picture",), produces=("answer",))
    return TokenProgram(
        embedding=TokenEmbedding(network),
        segments=(*blocks, leave),
        reads=("x", "sigma", "text", "guidance"),
        inputs=("picture", "prose"),
        constants=("modulation",),
        output="answer",
        control_kinds=("joint",),
    )


def make_token_rows(num_rows: int, *, side: int = 8, text_length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "x": torch.randn(num_rows, CHANNELS, side, side, generator=generator),
        "sigma": torch.rand(num_rows, generator=generator),
        "text": torch.randn(num_rows, text_length, WIDTH, generator=generator),
        "guidance": torch.rand(num_rows, generator=generator),
    }


def make_token_network(seed: int = 11) -> TokenNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TokenNetwork().requires_grad_(False).eval()
