"""Layers under Forge's names: they are torch's, and cast only when told to."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from backend.operations import (
    CastLayer,
    DynamicSwapInstaller,
    ForgeOperations,
    get_weight_and_bias,
    main_stream_worker,
    shift_manual_cast,
    using_forge_operations,
    weights_manual_cast,
)

LAYERS: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "Linear": ((4, 3), (2, 4)),
    "Conv1d": ((4, 3, 2), (1, 4, 5)),
    "Conv2d": ((4, 3, 2), (1, 4, 5, 5)),
    "Conv3d": ((4, 3, 2), (1, 4, 5, 5, 5)),
    "ConvTranspose1d": ((4, 3, 2), (1, 4, 5)),
    "ConvTranspose2d": ((4, 3, 2), (1, 4, 5, 5)),
    "ConvTranspose3d": ((4, 3, 2), (1, 4, 5, 5, 5)),
    "GroupNorm": ((2, 4), (2, 4, 3)),
    "LayerNorm": ((4,), (2, 4)),
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Conv1d(4, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x)[..., None])
        return result


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_computes_in_the_type_of_its_input_when_told_to(name: str) -> None:
    arguments, shape = LAYERS[name]
    layer = getattr(ForgeOperations, name)(*arguments)
    plain = getattr(nn, name)(*arguments)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), plain(x)) and isinstance(layer, getattr(nn, name))
    layer.to(torch.bfloat16)
    with pytest.raises(RuntimeError):
        layer(x)
    layer.parameters_manual_cast = True
    plain.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer(x), plain(x))
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}, "what is stored stays"


def test_an_embedding_keeps_its_type() -> None:
    layer = ForgeOperations.Embedding(5, 4).to(torch.bfloat16)
    layer.parameters_manual_cast = True
    assert layer(torch.tensor([1, 3])).dtype == torch.bfloat16


def test_layers_built_inside_are_cast_layers_and_others_are_not() -> None:
    with using_forge_operations(dtype=torch.bfloat16, manual_cast_enabled=True):
        inside = Small()
        elsewhere: list[Small] = []
        thread = threading.Thread(target=lambda: elsewhere.append(Small()))
        thread.start()
        thread.join()
    for layer in (inside.first, inside.second[0]):
        assert isinstance(layer, CastLayer) and layer.parameters_manual_cast and layer.weight.dtype == torch.bfloat16
    assert inside(torch.randn(2, 4)).dtype == torch.float32
    assert not any(isinstance(layer, CastLayer) for built in (*elsewhere, Small()) for layer in built.modules())
    shift_manual_cast(inside, False)
    with pytest.raises(RuntimeError):
        inside(torch.randn(2, 4))
    with pytest.raises(ValueError, match="'nf4' cannot be built empty"), using_forge_operations(bnb_dtype="nf4"):
        pass


def test_a_swapped_module_is_as_before_afterwards() -> None:
    module = Small().to(torch.bfloat16)
    DynamicSwapInstaller.install_model(module)
    assert module(torch.randn(2, 4)).dtype == torch.float32
    DynamicSwapInstaller.uninstall_model(module)
    assert type(module.first) is nn.Linear and "parameters_manual_cast" not in vars(module.first)


def test_weights_are_moved_and_changed_as_asked() -> None:
    layer, x = nn.Linear(4, 3).to(torch.bfloat16), torch.zeros(1, 4)
    weight, bias, signal = weights_manual_cast(layer, x, skip_bias_dtype=True, weight_fn=lambda tensor: tensor * 2)
    with main_stream_worker(weight, bias, signal):
        assert weight is not None and bias is not None
        assert (weight.dtype, bias.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(weight, layer.weight.float() * 2)
    assert get_weight_and_bias(nn.Linear(2, 2, bias=False))[1] is None
