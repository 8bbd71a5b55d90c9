"""Counting and moving modules; counts are compared with numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from backend.devices import virtual_gpu
from backend.memory.module_bytes import (
    count_module_bytes,
    count_state_dict_bytes,
    count_state_dict_parameters,
    most_common_dtype,
    move_module,
)
from backend.memory.streaming import LayerBytes, choose_resident_layers, list_layers


@pytest.fixture
def gpu() -> torch.device:
    return virtual_gpu.install((2**20, 2**20))[0]


def tied() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))
    net[2][0].weight = net[0].weight
    return net.requires_grad_(False)


def test_bytes_of_distinct_tensors() -> None:
    counted = count_module_bytes(tied())
    # one weight 64, two biases 32, batch norm: weight, bias, mean, variance 64 and a counter of 8
    assert (counted.total_bytes, counted.weight_bytes, counted.other_bytes) == (168, 80, 88)


def test_state_dict_numbers() -> None:
    state = {"a": torch.zeros(3, dtype=torch.float16), "b": torch.zeros(2), "c": torch.zeros(1), "note": "text"}
    assert count_state_dict_bytes(state) == 6 + 8 + 4
    assert count_state_dict_bytes(state, torch.device("cpu")) == 0
    assert count_state_dict_parameters(state) == 6
    assert most_common_dtype(state) == torch.float32
    assert most_common_dtype({}) == torch.float32


def test_the_whole_tree_moves_and_ties_are_kept(gpu: torch.device) -> None:
    net = tied()
    move_module(net, gpu)
    assert {tensor.device for tensor in net.state_dict().values()} == {gpu}
    assert net[2][0].weight is net[0].weight
    assert virtual_gpu.get_device(gpu).live_bytes == 168


def test_patterns_exclude_names_and_whole_branches(gpu: torch.device) -> None:
    net = tied()
    move_module(net, gpu, excluded_patterns=("2", "*.running_*"))
    places = {name: tensor.device.type for name, tensor in net.named_parameters(remove_duplicate=False)}
    places |= {name: tensor.device.type for name, tensor in net.named_buffers()}
    assert places == {
        "0.weight": "vgpu",
        "0.bias": "vgpu",
        "1.weight": "vgpu",
        "1.bias": "vgpu",
        "2.0.weight": "cpu",
        "2.0.bias": "cpu",
        "1.running_mean": "cpu",
        "1.running_var": "cpu",
        "1.num_batches_tracked": "vgpu",
    }
    assert isinstance(net[0].weight, nn.Parameter)


def test_a_tie_survives_a_move_in_part(gpu: torch.device) -> None:
    net = tied()
    move_module(net, gpu, excluded_patterns=("1",))
    assert net[2][0].weight is net[0].weight and net[0].weight.device == gpu


def test_only_the_modules_own_tensors_move(gpu: torch.device) -> None:
    net = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    net.register_buffer("scale", torch.ones(1))
    move_module(net, gpu, recursive=False)
    assert net.scale.device == gpu and net[0].weight.device.type == "cpu"


def test_a_move_in_inference_mode_can_be_undone_outside(gpu: torch.device) -> None:
    net = nn.Linear(2, 2)
    with torch.inference_mode():
        move_module(net, gpu)
    move_module(net, torch.device("cpu"))
    assert net.weight.requires_grad and not net.weight.is_inference()


def test_small_layers_stay_and_room_for_the_largest_is_left() -> None:
    layers = [LayerBytes(name=name, own_bytes=size, fetch_bytes=size) for name, size in (("a", 10), ("b", 40), ("c", 20), ("d", 30))]
    assert choose_resident_layers(layers, 100) == frozenset("abcd")
    assert choose_resident_layers(layers, 99) == frozenset("ac")  # 99 - 40 for the largest = 59: 10 + 20, and 30 no more
    assert choose_resident_layers(layers, 40) == frozenset()
    assert choose_resident_layers([], 0) == frozenset()
    table = LayerBytes(name="table", own_bytes=50, fetch_bytes=0)
    assert choose_resident_layers([*layers, table], 99) == frozenset("ac")
    assert choose_resident_layers([layers[0], table], 15) == frozenset()  # 15 - 10 to fetch "a" leaves 5
    assert choose_resident_layers([table], 49) == frozenset()


def test_layers_are_the_modules_with_tensors() -> None:
    assert [(layer.name, layer.own_bytes) for layer in list_layers(tied())] == [("0", 80), ("1", 72), ("2.0", 80)]
