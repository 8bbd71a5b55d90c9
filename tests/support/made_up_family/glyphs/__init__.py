"""Glyphs, a family that nobody has trained: two transformer blocks over picture and letters, latents of 8 channels at a quarter of the side,
a rectified flow, and letters as tokens. Its files fuse q, k and v; the network keeps them separate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from backend.checkpoint_file import TensorFile
from backend.checkpoint_layout import Layout, Part
from backend.checkpoint_prediction import FLOW, PredictionSpec
from backend.families.family import Component, Family, FoundDenoiser, Guidance, PageDefaults
from backend.families.key_map import KeyMap, equal_rows
from backend.families.latent_format import LatentFormat
from backend.families.unet_family import kl_vae
from backend.modules.k_prediction import FlowPrediction
from backend.nn.program import Addition, NamedLayers, Program, ProgramState, Segment, TransformerOptions
from backend.state_dict import LoadPlan, build_empty, plan_as_named

PREFIX, TEXT_PREFIX = "glyph.", "letters."
LENGTH, LETTERS = 16, 128
LATENT = LatentFormat(channels=8, factor=4, scale=0.5, shift=0.1, preview=tuple((0.1, 0.0, -0.1) for _ in range(8)) + ((0.5, 0.5, 0.5),))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens_BLD: Tensor, time_BD: Tensor) -> Tensor:
        seen = torch.nn.functional.layer_norm(tokens_BLD, tokens_BLD.shape[-1:]) + time_BD[:, None]
        return tokens_BLD + self.out(scaled_dot_product_attention(self.to_q(seen), self.to_k(seen), self.to_v(seen)))


class Glyphs(nn.Module):
    def __init__(self, width: int, num_blocks: int, has_guidance: bool = True) -> None:
        super().__init__()
        self.guidance = nn.Linear(1, width) if has_guidance else None
        self.enter, self.time, self.leave = nn.Linear(LATENT.channels, width), nn.Linear(1, width), nn.Linear(width, LATENT.channels)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))

    def embed_time(self, timesteps_B: Tensor, guidance_B: Tensor | None, dtype: torch.dtype) -> Tensor:
        time_BD = self.time(timesteps_B[:, None].to(dtype) / 1000)
        if self.guidance is None:
            return time_BD  # type: ignore[no-any-return]
        assert guidance_B is not None
        return time_BD + self.guidance(guidance_B[:, None].to(dtype))  # type: ignore[no-any-return]

    def forward(self, x_BCHW: Tensor, timesteps_B: Tensor, context_BLD: Tensor, guidance_B: Tensor | None = None) -> Tensor:
        time_BD = self.embed_time(timesteps_B, guidance_B, x_BCHW.dtype)
        tokens = torch.cat([context_BLD, self.enter(x_BCHW.flatten(2).transpose(1, 2))], dim=1)
        for block in self.blocks:
            tokens = block(tokens, time_BD)
        return self.leave(tokens[:, context_BLD.shape[1] :]).transpose(1, 2).reshape(x_BCHW.shape)  # type: ignore[no-any-return]


# the network as a program


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockSegment(Segment):
    def __call__(self, state: ProgramState, first_block: int = 0, end_block: int | None = None) -> None:
        (block,) = self.layers
        state.tensors["tokens"] = block(state.tensors["tokens"], state.tensors["time"])


@dataclass(frozen=True, eq=False, kw_only=True)
class LeaveSegment(Segment):
    def __call__(self, state: ProgramState, first_block: int = 0, end_block: int | None = None) -> None:
        (leave,) = self.layers
        tokens, shape = state.tensors.pop("tokens"), state.options["latent_shape"]
        state.tensors["flow"] = leave(tokens[:, -shape[-1] * shape[-2] :]).transpose(1, 2).reshape(shape)


@dataclass(frozen=True, eq=False)
class Entrance:
    network: Any

    @property
    def named_layers(self) -> NamedLayers:
        layers = (("enter", self.network.enter), ("time", self.network.time))
        return layers if self.network.guidance is None else (*layers, ("guidance", self.network.guidance))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self.named_layers:
            yield from layer.named_parameters(prefix=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class GlyphProgram(Program):
    embedding: Entrance

    def start(
        self, rows: Mapping[str, Tensor], *, residuals: Mapping[Addition, Tensor] | None = None, options: TransformerOptions | None = None
    ) -> ProgramState:
        network, x_BCHW = self.embedding.network, rows["x"]
        tokens = torch.cat([rows["context"], network.enter(x_BCHW.flatten(2).transpose(1, 2))], dim=1)
        time_BD = network.embed_time(rows["timesteps"], rows.get("guidance"), x_BCHW.dtype)
        return ProgramState({"tokens": tokens, "time": time_BD}, dict(residuals or {}), {**(options or {}), "latent_shape": x_BCHW.shape})

    def example_rows(self, *, latent_height: int, latent_width: int, context_length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        width = self.embedding.network.enter.out_features
        rows = {
            "x": torch.empty(1, LATENT.channels, latent_height, latent_width, device="meta", dtype=dtype),
            "timesteps": torch.empty(1, device="meta"),
            "guidance": torch.empty(1, device="meta"),
            "context": torch.empty(1, LENGTH, width, device="meta", dtype=dtype),
        }
        return {name: tensor for name, tensor in rows.items() if name in self.reads}

    def working_bytes(self, shape: Sequence[int], itemsize: int) -> float:
        return 64.0 * self.embedding.network.enter.out_features * shape[0] * shape[2] * shape[3] * itemsize


def build_glyph_program(network: Any) -> GlyphProgram:
    def segment(kind: type[Segment], name: str, number: int, produces: str) -> Segment:
        layers = ((name, network.get_submodule(name)),)
        return kind(kind=name.partition(".")[0], number=number, named_layers=layers, consumes=("tokens",), produces=(produces,))

    blocks = [segment(BlockSegment, f"blocks.{number}", number, "tokens") for number in range(len(network.blocks))]
    return GlyphProgram(
        embedding=Entrance(network),
        segments=(*blocks, segment(LeaveSegment, "leave", 0, "flow")),
        reads=("x", "timesteps", "context") if network.guidance is None else ("x", "timesteps", "context", "guidance"),
        inputs=("tokens",),
        constants=("time",),
        output="flow",
    )


# files


def identify(file: TensorFile) -> FoundDenoiser | None:
    info = file.infos.get(f"{PREFIX}blocks.0.qkv.weight")
    if info is None:
        return None
    num_blocks = len({key.split(".")[2] for key in file.infos if key.startswith(f"{PREFIX}blocks.")})
    width = info.shape[1]
    config = {"width": width, "num_blocks": num_blocks, "has_guidance": f"{PREFIX}guidance.weight" in file.infos}
    return FoundDenoiser(part=Part(PREFIX, Layout.LDM), config=config, context_width=width)


def key_map(network: Any) -> KeyMap:
    """q, k and v of a block are one matrix in the file; the output projection has another name there."""
    modules, rows = {"leave": "head.project"}, {}
    for number, block in enumerate(network.blocks):
        names = tuple(f"blocks.{number}.{part}" for part in ("to_q", "to_k", "to_v"))
        modules.update(dict.fromkeys(names, f"blocks.{number}.qkv"))
        rows.update(equal_rows(names, 3 * block.to_q.out_features))
    return KeyMap(modules=modules, rows=rows)


# letters


class LetterEncoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(LETTERS, width)


class LetterEngine:
    """Letters of a prompt, padded with 0."""

    comma_padding_backtrack = 0

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __call__(self, texts: Sequence[str]) -> Tensor:
        letters = [[min(ord(letter), LETTERS - 1) for letter in f"draw: {text}"[:LENGTH]] for text in texts]
        table = self._encoder.table
        return table(torch.tensor([line + [0] * (LENGTH - len(line)) for line in letters], device=table.weight.device)).float()  # type: ignore[no-any-return]

    def set_clip_skip(self, clip_skip: int) -> None:
        """There are no layers to skip."""

    def set_emphasis(self, name: str) -> None:
        """Letters have no weights."""

    def get_prompt_lengths(self, prompt: str) -> tuple[int, int]:
        return len(prompt), LENGTH

    def take_generation_params(self) -> dict[str, str]:
        return {}


def _find_letters(file: TensorFile) -> Sequence[Part]:
    return [Part(TEXT_PREFIX, Layout.TRANSFORMERS)] if f"{TEXT_PREFIX}table.weight" in file.infos else []


def _letter_width(file: TensorFile, part: Part) -> int:
    return file.infos[f"{part.prefix}table.weight"].shape[1]


def _plan_letters(encoder: nn.Module, file: TensorFile, part: Part) -> LoadPlan:
    return plan_as_named(encoder, file, lambda key: part.prefix + key)


def join(denoiser: nn.Module, vae: nn.Module, encoders: Sequence[nn.Module]) -> dict[str, Tensor]:
    joined = {f"{PREFIX}{key}": tensor for key, tensor in key_map(denoiser).to_original(denoiser.state_dict()).items()}
    joined.update({f"vae.{key}": tensor for key, tensor in vae.state_dict().items()})
    joined.update({f"{TEXT_PREFIX}{key}": tensor for key, tensor in encoders[0].state_dict().items()})
    return {key: tensor.detach().contiguous() for key, tensor in joined.items()}


FAMILY = Family(
    name="glyphs",
    title="Glyphs",
    line="Glyphs",
    rank=50,
    identify=identify,
    build_denoiser=lambda found: build_empty(lambda: Glyphs(**found.config)),
    key_map=key_map,
    build_program=build_glyph_program,
    text_encoders=(
        Component(
            name="letters",
            title="letter",
            find=_find_letters,
            build=lambda file, part: build_empty(lambda: LetterEncoder(_letter_width(file, part))),
            plan=_plan_letters,
            width=_letter_width,
        ),
    ),
    vae=kl_vae(LATENT, "Glyphs"),
    latent=LATENT,
    find_prediction=lambda file, found, network: PredictionSpec(kind=FLOW, source="the family's rule"),
    make_predictor=lambda prediction: FlowPrediction(shift=3.0),
    native_size_px=lambda prediction: 64,
    build_text_engines=lambda encoders, tokenizers, embeddings: [LetterEngine(encoders["letters"])],
    encode=lambda model, prompt: model.run_text_engine(0, prompt),
    join_checkpoint=join,
    attends_jointly=True,
    shift_of_tokens=lambda tokens, steps: 1 + tokens / 64,
    forge_shifts_table_alone=True,
    default_schedule="simple",
    guidance=Guidance(distilled=2.0),
    defaults=PageDefaults(schedule="Simple", cfg=4.0, width_px=64, height_px=64),
    denoiser_title="transformer",
)
