"""Files whose names and shapes no network has: each is refused by name before weights are read, and reading names takes linear time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backend.checkpoint_config import read_unet_shape
from backend.checkpoint_file import CheckpointError, TensorInfo, open_tensor_file
from backend.checkpoint_layout import Layout, Part
from backend.clip_vision import load_clip_vision
from backend.controlnet_loader import build_control, load_controlnet
from backend.families import registry
from backend.ip_adapter import read_ip_adapter
from backend.tensor_file import refusing_odd_shapes

HEAD = "vision_model."
TOWER = {
    f"{HEAD}embeddings.patch_embedding.weight": (32, 3, 8, 8),
    f"{HEAD}embeddings.position_embedding.weight": (17, 32),
    f"{HEAD}encoder.layers.0.mlp.fc1.weight": (64, 32),
    "visual_projection.weight": (16, 32),
}
FLUX = {
    "double_blocks.0.img_attn.norm.key_norm.scale": (16,),
    "single_blocks.0.linear1.weight": (4, 4),
    "img_in.weight": (32, 64),
    "txt_in.weight": (32, 32),
    "vector_in.in_layer.weight": (32, 32),
    "final_layer.linear.weight": (64, 32),
}
UNET = {
    "input_blocks.0.0.weight": (32, 4, 3, 3),
    "input_blocks.1.0.in_layers.2.weight": (32, 32, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (32, 32),
    "input_blocks.1.1.proj_in.weight": (32, 32),
    "output_blocks.0.0.in_layers.2.weight": (32, 32, 3, 3),
    "out.2.weight": (4, 32, 3, 3),
}
ADAPTER = {"image_proj.proj.weight": (128, 16), "image_proj.norm.weight": (32,), "ip_adapter.1.to_k_ip.weight": (32, 32)}


@dataclass
class Named:
    """A file of which only the names and shapes matter."""

    shapes: Mapping[str, tuple[int, ...]]
    path: Path = Path("odd.safetensors")
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {key: TensorInfo(shape, torch.float16) for key, shape in self.shapes.items()}

    def read(self, key: str, **_: Any) -> torch.Tensor:
        return torch.zeros(self.shapes[key])

    def close(self) -> None: ...


def written(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    path = folder / "odd.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("key", FLUX)
@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (1,), (1, 1, 1), (2**40, 0)])
def test_a_transformer_of_odd_shapes_is_refused_or_described(key: str, shape: tuple[int, ...]) -> None:
    with Refusals() as refused:
        registry.identify(Named({**FLUX, key: shape}))  # type: ignore[arg-type]
    assert not refused or refused[0].startswith("odd.safetensors: ")


@pytest.mark.parametrize("key", UNET)
@pytest.mark.parametrize("shape", [(), (0,), (0, 0, 0, 0), (1,), (2**40, 0)])
def test_a_unet_of_odd_shapes_is_refused_or_described(key: str, shape: tuple[int, ...]) -> None:
    with Refusals() as refused:
        registry.identify(Named({**UNET, key: shape}))  # type: ignore[arg-type]
    assert not refused or refused[0].startswith("odd.safetensors: ")


class Refusals:
    """Collects a CheckpointError; everything else is the test's failure."""

    def __enter__(self) -> list[str]:
        self.refused: list[str] = []
        return self.refused

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, CheckpointError):
            self.refused.append(str(error))
        return isinstance(error, CheckpointError)


def test_a_scalar_where_a_norm_is_names_the_file_and_the_reason() -> None:
    with pytest.raises(CheckpointError, match=r"odd.safetensors: the shapes of its tensors fit no known network \(IndexError: tuple index"):
        registry.identify(Named({**FLUX, "double_blocks.0.img_attn.norm.key_norm.scale": ()}))  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [IndexError, KeyError, ZeroDivisionError, OverflowError, TypeError, ValueError, AssertionError, StopIteration])
def test_what_odd_shapes_raise_is_a_refusal_and_other_errors_stay(error: type[Exception]) -> None:
    with (
        pytest.raises(CheckpointError, match=r"odd.safetensors with odd.safetensors: .*Download it again"),
        refusing_odd_shapes(Named({}), Named({})),
    ):
        raise error("x")
    with pytest.raises(MemoryError), refusing_odd_shapes(Named({})):
        raise MemoryError
    with pytest.raises(CheckpointError, match=r"^mine$"), refusing_odd_shapes(Named({})):
        raise CheckpointError("mine")


@pytest.mark.parametrize("number", ["999999999", "1\u00b23", "-1", ""])
def test_a_layers_number_builds_no_layers(number: str, tmp_path: Path) -> None:
    """A billion layers were built for one name."""
    with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
        load_clip_vision(written(tmp_path, {**TOWER, f"{HEAD}encoder.layers.{number}.mlp.fc1.weight": (1,)}))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(), (32,), (0, 0), (17, 32, 1)])
def test_a_picture_tower_of_odd_shapes_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    for key in TOWER:
        with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
            load_clip_vision(written(tmp_path, {**TOWER, key: shape}))


@pytest.mark.parametrize(
    "shapes",
    [
        {**ADAPTER, "ip_adapter.1\u00b23.to_k_ip.weight": (1,)},
        {"image_proj.norm.weight": (32,), "ip_adapter.1.to_k_ip.weight": (1,), "ip_adapter.1.to_v_ip.weight": (1,)},
        {**ADAPTER, "image_proj.proj.weight": (), "ip_adapter.1.to_v_ip.weight": (32, 32)},
        {**ADAPTER, "ip_adapter.1.to_k_ip.weight": (), "ip_adapter.1.to_v_ip.weight": (32, 32)},
    ],
)
def test_an_ip_adapter_of_odd_names_or_shapes_is_refused(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    with open_tensor_file(written(tmp_path, shapes)) as file, pytest.raises(CheckpointError, match=r"odd\.safetensors"):
        read_ip_adapter(file)


def test_an_ip_adapter_whose_sizes_multiply_takes_no_memory(tmp_path: Path) -> None:
    """Two thin matrices of a few megabytes ask for a layer of 4 terabytes between them."""
    wide = 1_000_000
    shapes = {
        "image_proj.latents": (1, 1, wide), "image_proj.proj_in.weight": (1, wide), "image_proj.proj_out.weight": (wide, 1),
        "image_proj.layers.0.0.to_q.weight": (1, 1), "ip_adapter.1.to_k_ip.weight": (1, 1), "ip_adapter.1.to_v_ip.weight": (1, 1),
    }  # fmt: skip
    with open_tensor_file(written(tmp_path, shapes)) as file, pytest.raises(CheckpointError, match="of an unsupported kind"):
        read_ip_adapter(file)


@pytest.mark.parametrize("shape", [(), (32,), (0, 0, 0, 0)])
def test_a_controlnet_of_odd_shapes_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    shapes = {f"control_model.{key}": value for key, value in UNET.items() if not key.startswith("out")}
    shapes |= {"control_model.zero_convs.0.0.weight": (32, 32, 1, 1), "control_model.input_hint_block.0.weight": (16, 3, 3, 3)}
    for key in shapes:
        with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
            load_controlnet(written(tmp_path, {**shapes, key: shape}))


def test_a_controlnet_wider_than_any_memory_is_refused() -> None:
    """Found by the fuzz: torch cannot even count its bytes."""
    shapes = {f"control_model.{key}": value for key, value in UNET.items() if not key.startswith("out")}
    shapes |= {"control_model.zero_convs.0.0.weight": (32, 32, 1, 1), "control_model.input_hint_block.0.weight": (16, 3, 3, 3)}
    shapes |= {"control_model.input_hint_block.2.weight": (16, 16, 3, 3), "control_model.input_blocks.1.0.in_layers.2.weight": (2**62, 32, 3, 3)}
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: .*(Storage size|overflow)"):
        build_control(Named(shapes))  # type: ignore[arg-type]


def lines_of(call: Any) -> int:
    """Lines of Python that run in `call`."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", ["input_blocks.{}.0.in_layers.2.weight", "output_blocks.{}.0.x", "input_blocks.1.1.transformer_blocks.{}.x"])
def test_names_of_blocks_without_end_are_read_in_linear_time(name: str) -> None:
    def read(number: int) -> None:
        shapes = {**UNET, **{name.format(index): (32, 32, 3, 3) for index in range(number)}}
        read_unet_shape(Named(shapes), Part("", Layout.LDM))  # type: ignore[arg-type]

    read(10)
    short, long = lines_of(lambda: read(100)), lines_of(lambda: read(400))
    assert long < 5 * short
